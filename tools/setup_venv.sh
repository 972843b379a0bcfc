# Sourced by the set-up scripts, from the repository's top folder: makes a virtual environment, installs the given
# requirement files into it if they changed since the last time, and sets `python` to its interpreter.
#   VENV    the environment's folder (default: .venv in the checkout)
#   PYTHON  the interpreter to make it with (default: python3)

setup_venv() {
  local venv=${VENV:-$PWD/.venv} stamp
  python=$venv/bin/python
  if [ ! -x "$python" ]; then
    echo "making a virtual environment in $venv"
    "${PYTHON:-python3}" -m venv "$venv"
  fi
  stamp=$venv/.installed-$(cat "$@" | cksum | cut -d ' ' -f 1)
  if [ ! -e "$stamp" ]; then
    echo "installing $* (PyTorch with CUDA is several GB: minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
    touch "$stamp"
  fi
}
