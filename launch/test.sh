#!/usr/bin/env bash
# Installs what the tests need and runs them all, two at a time; arguments go to pytest.
#
#   bash launch/test.sh [--quick] [-k NAME] [-x] ...
#
# --quick runs the tests that find most, in under three minutes: a covering set of the conformance table, and of the others
# those that start no processes and are not slow.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
k4p1_install '.[dev]'

ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
