#!/usr/bin/env bash
# Sets up, then trains on two machines that are network namespaces of this one, and takes them away:
#   bash tools/node_drill.sh
#   bash tools/node_drill.sh --cases lost elastic
# Needs Linux, root and iproute2. VENV and PYTHON: see tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_venv.sh
setup_venv requirements.txt
"$python" tools/node_drill.py "$@"
