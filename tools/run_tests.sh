#!/usr/bin/env bash
# Sets up, then lints and tests. Options go to pytest:
#   bash tools/run_tests.sh
#   bash tools/run_tests.sh -k config
# VENV and PYTHON: see tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_venv.sh
setup_venv requirements.txt tests/requirements.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
