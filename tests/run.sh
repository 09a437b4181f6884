#!/usr/bin/env bash
# Installs what the tests need, then runs every check. Arguments go to pytest: `bash tests/run.sh -k topology`.
# The job scripts' own tests start a Slurm: `bash tests/slurm/install.sh && bash tests/run.sh -m slurm`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
BIN=.venv/bin

step() {
    printf '[tests] %s\n' "$*"
    "$@" || { printf '[tests] FAILED: %s\n' "$*" >&2; exit 1; }
}

step "$BIN/ruff" check .
step "$BIN/ruff" format --check .
step "$BIN/mypy"
step "$BIN/lint-imports"
# Two files of tests at a time: most of a test's seconds are one process's, so two cores would not be busy with one. In
# their own order, in which the dearest come first, so that neither is left with a long one at the end.
step "$BIN/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
printf '[tests] all passed\n'
