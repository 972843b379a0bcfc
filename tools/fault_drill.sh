#!/usr/bin/env bash
# Sets up, then kills training runs at random moments and checks that none is lost or ends differently:
#   bash tools/fault_drill.sh --kills 50
#   bash tools/fault_drill.sh --minutes 60 --seed 1
# VENV and PYTHON: see tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_venv.sh
setup_venv requirements.txt
"$python" tools/fault_drill.py "$@"
