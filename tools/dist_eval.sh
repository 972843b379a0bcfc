#!/usr/bin/env bash
# Evaluate on N processes of this machine (one GPU each, or CPU):
#   bash tools/dist_eval.sh configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml 8 --data-path DATA --resume FILE
# PYTHON names the interpreter, PORT the rendezvous port.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash tools/dist_eval.sh CONFIG PROCESSES [options of main_eval.py]" >&2
  exit 2
fi
config=$1 processes=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run --nproc_per_node "$processes" --master_port "${PORT:-29500}" \
  "$(dirname "$0")/../main_eval.py" --cfg "$config" "$@"
