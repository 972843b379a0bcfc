#!/usr/bin/env bash
# torchrun of PyTorch 2.14.1 with --nnodes 1:2: while one machine works alone, a second one that comes (back) ends the
# whole job. Both launchers wait 60 seconds for each other, then fail with a DistStoreError. The documentation says that
# machines may come and go.
# With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 the second machine is taken in.
# Reason, seen in torch/distributed/elastic/rendezvous/dynamic_rendezvous.py: each round of the rendezvous has a store of
# its own, but a launcher that has been rank 0 before keeps the address from its first round and does not put it into
# the new one, where the newcomer looks for it.
# Two launchers on this machine stand for two machines. Installs PyTorch into a temporary folder (some GB). Exit status
# 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cd "$folder"
cat >work.py <<'EOF'
import os
import time
from pathlib import Path

world = os.environ["WORLD_SIZE"]
print(f"working in a world of {world}", flush=True)
if world == "2":
    Path("both").touch()  # the aim is reached: both may end
for _ in range(1200):
    if Path("both").exists():
        break
    time.sleep(0.1)
EOF

launch() { # PORT IS_HOST
  "$folder/venv/bin/python" -m torch.distributed.run --nnodes 1:2 --nproc_per_node 1 --max-restarts 3 \
    --rdzv_backend c10d --rdzv_id job --rdzv_endpoint "127.0.0.1:$1" --local_addr 127.0.0.1 \
    --rdzv_conf "is_host=$2,last_call_timeout=1" --monitor-interval 0.5 work.py
}
try() { # PORT
  rm -f both
  launch "$1" 1 >first.txt 2>&1 &
  local first=$!
  until grep -q "world of 1" first.txt; do sleep 0.2; done
  launch "$1" 0 >second.txt 2>&1 && second_status=0 || second_status=$?
  wait "$first" && first_status=0 || first_status=$?
}

try 29611
test "$first_status $second_status" = "1 1"
test ! -e both
grep -q "DistStoreError: wait timeout after 60000ms.*MASTER_ADDR" second.txt
grep -q "DistStoreError: wait timeout after 60000ms.*role_info" first.txt
echo "a machine that comes later: both launchers fail; the second waits for MASTER_ADDR, the first for the second"

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
try 29612
test "$first_status $second_status" = "0 0"
test -e both
grep -q "world of 2" first.txt
echo "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: taken in, both finish"
