#!/usr/bin/env bash
# Sets up, then lints and tests. Options go to pytest:
#   bash tools/run_tests.sh
#   bash tools/run_tests.sh -m "not slow"   # 3 to 4 minutes
#   bash tools/run_tests.sh -k config
# VENV and PYTHON: see tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup_venv.sh
# Not loggers.txt: the tests have stand-ins for its packages, which bring a hundred others.
GLOBIGNORE=requirements/loggers.txt
setup_venv requirements.txt requirements/*.txt tests/requirements.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
# Two workers on one thread each: with more threads than cores they slow each other down. Each has half of the tests, in
# order, so that fixtures of a file are made once. Who is done first takes over half of what the other has left.
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal "$@"
