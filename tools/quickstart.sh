#!/usr/bin/env bash
# From a fresh machine to a trained Strip-MLP: sets up, trains strip_mlp_pico on scikit-learn's handwritten digits,
# evaluates the best checkpoint and draws the training curves. Needs Python 3.10 or newer and no GPU.
#   bash tools/quickstart.sh
# VENV and PYTHON: see tools/setup_venv.sh. OUTPUT: root of the output folders (default: output).
set -euo pipefail
if [ $# -gt 0 ]; then  # it has no options
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  case $1 in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi
cd "$(dirname "$0")/.."
source tools/setup_venv.sh
setup_venv requirements.txt requirements/figures.txt

# The model is so small that a second thread gains little, and costs many times that where something else runs too.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
config=configs/strip_mlp_pico_digits.yaml
output=${OUTPUT:-output}
run=$output/strip_mlp_pico_digits/default
"$python" main.py --cfg $config --output "$output"
"$python" main_eval.py --cfg $config --output "$output" --resume "$run/best.pth" --json "$run/eval.json"
"$python" tools/plot_metrics.py "$run"

cat <<EOF

checkpoints      $run/best.pth, last.pth, ckpt_epoch_N.pth
evaluation       $run/eval.json
training curves  $run/curves.png
numbers          $run/metrics.jsonl, and TensorBoard: $python -m tensorboard.main --logdir $run
log, config      $run/log_rank0.txt, config.yaml
EOF
