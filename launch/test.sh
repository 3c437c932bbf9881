#!/usr/bin/env bash
# Installs what the tests need and runs them all; arguments go to pytest.
#
#   bash launch/test.sh [-k NAME] [-x] ...
set -euo pipefail
source "$(dirname "$0")/environment.sh"
k4p1_install '.[dev]'

ruff check .
ruff format --check .
python -m pytest "$@"
