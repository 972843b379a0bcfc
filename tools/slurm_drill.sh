#!/usr/bin/env bash
# tools/slurm/train.sbatch under a real Slurm, on this machine alone: it is signalled, pre-empted and requeued, and must
# end with the weights of a job that nobody disturbed. Then what else users start in a job.
#   bash tools/slurm_drill.sh
# Needs root, and Debian's packages slurm-wlm and munge; nothing of a Slurm that runs already is touched. Takes some
# minutes. VENV and PYTHON: see tools/setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
for command in slurmctld slurmd munged sbatch; do
  command -v "$command" >/dev/null || { echo "error: $command is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done
[ "$(id -u)" -eq 0 ] || { echo "error: slurmd starts jobs as root: run this as root, in a container for example" >&2; exit 2; }
source tools/setup_venv.sh
setup_venv requirements.txt
PYTHON=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cores=$(nproc) # before OMP_NUM_THREADS, which nproc heeds
export PYTHON OMP_NUM_THREADS=1

folder=$(mktemp -d)
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf # from here on no command talks to another Slurm
stop() {
  if [ -s "$folder/slurmctld.pid" ]; then scancel --user root 2>/dev/null && sleep 2; fi
  for daemon in slurmd slurmctld munged; do
    [ ! -s "$folder/$daemon.pid" ] || kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
  done
  sleep 1
  if [ -z "${KEEP:-}" ]; then rm -rf "$folder"; else echo "kept: $folder"; fi
}
trap stop EXIT

# ---- A Slurm of one machine with two partitions, the jobs of the second before those of the first
head -c 128 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" --force
host=$(hostname -s)
mkdir "$folder/state" "$folder/spool"
cat >"$folder/slurm.conf" <<EOF
ClusterName=drill
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=4000
PartitionName=usual Nodes=$host Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=$host PriorityTier=2 PreemptMode=OFF
EOF
printf 'CgroupPlugin=autodetect\nIgnoreSystemd=yes\n' >"$folder/cgroup.conf"
slurmctld
slurmd
is_ready() { [ "$(sinfo --noheader --format=%t --partition=usual 2>/dev/null)" = idle ]; }
for _ in $(seq 30); do
  is_ready && break
  sleep 1
done
is_ready || { echo "error: Slurm did not start" >&2; tail -n 5 "$folder"/slurm*.log >&2; exit 1; }
echo "Slurm: $(sinfo --version), $(sinfo --noheader --format='%D node, %c cores, %t' --partition=usual)"

# ---- Jobs
epochs=12
submit() { # NAME OPTIONS...: the number of a job of two tasks that trains
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output="$folder/$1.out" "${@:2}" \
    tools/slurm/train.sbatch --cfg configs/strip_mlp_pico_digits.yaml --output "$folder/output" --tag "$1" \
    --opts TRAIN.EPOCHS $epochs TRAIN.WARMUP_EPOCHS 1
}
state() { scontrol --oneliner show job "$1" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p'; }
wait_for() { # SECONDS WHAT COMMAND...: until it succeeds
  for _ in $(seq "$1"); do
    if "${@:3}"; then return; fi
    sleep 1
  done
  echo "error: after $1 s: not $2" >&2
  tail -n 20 "$folder"/*.out >&2
  exit 1
}
is_state() { [ "$(state "$1")" = "$2" ]; }
is_done() { case $(state "$1") in COMPLETED) ;; FAILED | TIMEOUT | CANCELLED) echo "job $1: $(state "$1")" >&2; tail "$folder"/*.out >&2; exit 1 ;; *) false ;; esac; }
has_epoch() { [ "$(cat "$folder/output/strip_mlp_pico_digits/$1/metrics.jsonl" 2>/dev/null | wc -l)" -ge "$2" ]; }
at_once() { scontrol update JobId="$1" StartTime=now; } # a requeued job waits for two minutes otherwise
has_processes() { # TAG NUMBER: as metrics.jsonl says
  grep -q "\"processes\": $2}" "$folder/output/strip_mlp_pico_digits/$1/metrics.jsonl" ||
    { echo "error: the run $1 has not had $2 processes" >&2; cat "$folder"/*.out >&2; exit 1; }
  echo "   $1: $2"
}
once() { # NAME OPTIONS... COMMAND: a job of two tasks, which sbatch waits for
  sbatch --quiet --wait --ntasks=2 --output="$folder/$1.out" "${@:2:$#-2}" --wrap "${!#}" ||
    { echo "error: the job $1 has failed" >&2; cat "$folder/$1.out" >&2; exit 1; }
}
one_epoch="main.py --cfg configs/strip_mlp_pico_digits.yaml --output $folder/output --opts TRAIN.EPOCHS 1
  TRAIN.WARMUP_EPOCHS 0 TAG"
one_epoch=${one_epoch//$'\n'/}

echo "1. a job of two tasks that nobody disturbs"
job=$(submit undisturbed)
wait_for 600 "finished" is_done "$job"
has_processes undisturbed 2

echo "2. signalled as before its time is up: saves, ends with status 75, is requeued"
job=$(submit signalled)
wait_for 300 "at epoch 3" has_epoch signalled 2
scancel --signal=USR1 "$job"
wait_for 120 "requeued" is_state "$job" PENDING
at_once "$job"
wait_for 600 "finished" is_done "$job"

echo "3. pre-empted by a job of another partition"
job=$(submit preempted)
wait_for 300 "at epoch 3" has_epoch preempted 2
sbatch --quiet --partition=urgent --ntasks="$cores" --output=/dev/null --wrap "sleep 5"
wait_for 120 "requeued" is_state "$job" PENDING
at_once "$job"
wait_for 600 "finished" is_done "$job"

"$PYTHON" - "$folder/output/strip_mlp_pico_digits" <<'EOF'
import sys
from pathlib import Path

import torch

runs = {name: Path(sys.argv[1], name) for name in ("undisturbed", "signalled", "preempted")}
weights = {name: torch.load(run / "last.pth", weights_only=True)["model"] for name, run in runs.items()}
for name, run in runs.items():
    same = all(torch.equal(weights[name][key], value) for key, value in weights["undisturbed"].items())
    print(f"   {name}: {'same weights' if same else 'OTHER WEIGHTS'}")
    if not same:
        raise SystemExit(1)
EOF

echo "4. cancelled: saves, and does not come back"
job=$(submit cancelled)
wait_for 300 "at epoch 3" has_epoch cancelled 2
scancel "$job"
wait_for 120 "over" is_state "$job" CANCELLED
sleep 10
is_state "$job" CANCELLED || { echo "error: job $job is $(state "$job")" >&2; exit 1; }
grep -h "saved in" "$folder/cancelled.out" | head -n 1 | cut -c 1-60

echo "5. plain python in a job of two tasks: processes"
once plain "$PYTHON $one_epoch plain"
has_processes plain 1

echo "6. torchrun in a job of two tasks: processes"
once torchrun "$PYTHON -m torch.distributed.run --standalone --nproc_per_node 2 $one_epoch torchrun"
has_processes torchrun 2

echo "7. two steps of two tasks each at the same time: processes of each"
once steps --overcommit "srun --overlap -n 2 $PYTHON $one_epoch one & srun --overlap -n 2 $PYTHON $one_epoch two & wait"
has_processes one 2
has_processes two 2
echo "all as promised"
