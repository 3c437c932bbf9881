#!/usr/bin/env bash
# Installs what the tests need and runs them all, three at a time, as many of them wait; arguments go to pytest.
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
at_a_time=3
[[ " $* " == *" --quick "* ]] && at_a_time=2
python -m pytest -n "$at_a_time" --dist loadfile --no-loadscope-reorder "$@"
