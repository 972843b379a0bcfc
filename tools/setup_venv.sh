# Sourced by the set-up scripts, from the repository's top folder: makes a virtual environment, installs the given
# requirement files into it if they changed since the last time, and sets `python` to its interpreter.
#   VENV    the environment's folder (default: .venv in the checkout)
#   PYTHON  the interpreter to make it with (default: python3)

setup_venv() {
  local venv=${VENV:-$PWD/.venv} stamp
  python=$venv/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
      echo "error: $("${PYTHON:-python3}" --version); accepted: Python 3.10 or newer (PYTHON=... names another)" >&2
      return 1
    }
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
