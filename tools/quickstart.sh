#!/usr/bin/env bash
# From a fresh machine to a trained Strip-MLP: sets up, trains, evaluates the best checkpoint and draws the training
# curves. Needs Python 3.10 or newer and no GPU.
set -euo pipefail
usage() {
  cat <<'EOF'
bash tools/quickstart.sh                         scikit-learn's handwritten digits: a minute, nothing to download
bash tools/quickstart.sh fashion_mnist [FOLDER]  Fashion-MNIST, 70,000 photographs: an hour or more on 2 cores
FOLDER has Fashion-MNIST's files, or gets them by download. Default: where Debian's package puts them, or
data_fashion_mnist in this repository.
VENV and PYTHON: see tools/setup_venv.sh. OUTPUT: root of the output folders (default: output).
EOF
}
refuse() {
  echo "error: $1; accepted: digits (the default), or fashion_mnist and a folder" >&2
  usage >&2
  exit 2
}

repository=$(cd "$(dirname "$0")/.." && pwd)
case ${1:-digits} in
  digits)
    [ $# -le 1 ] || refuse "${*:2}"
    config=configs/strip_mlp_pico_digits.yaml name=strip_mlp_pico_digits data=()
    ;;
  fashion_mnist)
    config=configs/fashion_mnist/strip_mlp_pico.yaml name=strip_mlp_pico_fashion_mnist
    [ $# -le 2 ] || refuse "${*:3}"
    folder=${2:+$(mkdir -p "$2" && cd "$2" && pwd)}
    for place in /usr/share/datasets/fashion-mnist "$repository/data_fashion_mnist"; do
      [ -z "$folder" ] && [ -d "$place" ] && folder=$place
    done
    if [ -z "$folder" ]; then
      cat >&2 <<'EOF'
error: Fashion-MNIST is not there. Either of these gets it (30 MB):
  sudo apt-get install dataset-fashion-mnist                  # Debian, Ubuntu
  bash tools/quickstart.sh fashion_mnist data_fashion_mnist   # torchvision downloads it into that folder
EOF
      exit 2
    fi
    data=(--data-path "$folder")
    ;;
  -h | --help) usage; exit 0 ;;
  *) refuse "$1" ;;
esac

cd "$repository"
source tools/setup_venv.sh
setup_venv requirements.txt requirements/figures.txt

# The model is so small that a second thread gains little, and costs many times that where something else runs too.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
output=${OUTPUT:-output}
run=$output/$name/default
"$python" main.py --cfg $config ${data[@]+"${data[@]}"} --output "$output"
"$python" main_eval.py --cfg $config ${data[@]+"${data[@]}"} --output "$output" --resume "$run/best.pth" --json "$run/eval.json"
"$python" tools/plot_metrics.py "$run"

cat <<EOF

checkpoints      $run/best.pth, last.pth, ckpt_epoch_N.pth
evaluation       $run/eval.json
training curves  $run/curves.png
numbers          $run/metrics.jsonl, and TensorBoard: $python -m tensorboard.main --logdir $run
log, config      $run/log_rank0.txt, config.yaml
EOF
