# Sourced by the other scripts: goes to the project's folder and makes sure of a virtual environment.
#
# Uses the environment that is active; else `.venv` in the project's folder, made with the first Python of 3.10 to 3.13 found
# (set PYTHON to choose).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

k4p1_python_fits() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    found=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
      if k4p1_python_fits "$candidate"; then found=$candidate; break; fi
    done
    if [ -z "$found" ]; then
      echo "k4p1 needs Python 3.10 to 3.13 with venv; set PYTHON to one" >&2
      exit 1
    fi
    echo "making .venv with $("$found" --version)"
    "$found" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
# pip 23.0, which comes with Python 3.10, does not get done resolving the dependencies.
python -m pip install -qq --disable-pip-version-check --upgrade 'pip>=24.1'

k4p1_install() {
  echo "installing k4p1 and what it needs (TensorFlow: a few minutes the first time)"
  python -m pip install -qq --disable-pip-version-check --editable "$1"
}
