#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in one go of at most 9 minutes:
#   bash tools/gpu_session.sh --output FOLDER
#   bash tools/gpu_session.sh --device cpu --tiny --output FOLDER   # the rehearsal, without a GPU
# It installs nothing: what is missing is said at once. PYTHON: the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u tools/gpu_session.py "$@"
