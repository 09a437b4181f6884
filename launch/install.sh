#!/usr/bin/env bash
# Makes .venv in the checkout and installs lora_dist there: `bash launch/install.sh [dev]`. Safe to run again.
#
#   PYTHON           the interpreter to use (default: python3.11, on which the pinned set was tested, else a newer one)
#   LORA_DIST_TORCH  the torch to install instead of the one chosen here, e.g. "torch==2.11.0" or a wheel's path
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA="${1:-}"
TORCH_VERSION=2.13.0
PYTORCH_INDEX=https://download.pytorch.org/whl
PINS=launch/requirements-tested.txt

say() { printf '[install] %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found; install one or set PYTHON=/path/to/python3.11"
}

# What the installation depends on; the same text means there is nothing to do.
fingerprint() {
    cat pyproject.toml "$PINS" launch/install.sh
    printf '%s|%s\n' "$PWD" "${LORA_DIST_TORCH:-}"
}

make_venv() {
    if [ ! -x .venv/bin/python ]; then
        local python
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv .venv || die "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
    fi
}

# On a terminal pip shows its progress bars; a log gets warnings and errors only.
pip_install() {
    local quiet=--quiet
    [ ! -t 1 ] || quiet=--progress-bar=on
    .venv/bin/python -m pip install --disable-pip-version-check --no-input "$quiet" "$@"
}

has_new_enough_torch() {
    .venv/bin/python - 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
sys.exit(tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2]) < (2, 11))
PY
}

# Lowest compute capability of this machine's GPUs ("7.0"), nothing where there is none.
lowest_capability() {
    command -v nvidia-smi >/dev/null || return 0
    { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | sort -V | head -n 1
}

install_torch() {
    if [ -n "${LORA_DIST_TORCH:-}" ]; then
        say "torch: $LORA_DIST_TORCH, as LORA_DIST_TORCH says"
        pip_install "$LORA_DIST_TORCH"
        return
    fi
    if has_new_enough_torch; then
        say "torch: there already"
        return
    fi
    local capability
    capability=$(lowest_capability)
    if [ -z "$capability" ]; then
        say "torch: $TORCH_VERSION for CPU, no GPU here (some 200 MB)"
        install_from_pytorch cpu || pip_install "torch==$TORCH_VERSION"
    elif [ "$(printf '%s\n7.5\n' "$capability" | sort -V | head -n 1)" != 7.5 ]; then
        say "torch: $TORCH_VERSION for CUDA 12.6, the last that runs on compute capability $capability (some 3 GB)"
        install_from_pytorch cu126 || die "$PYTORCH_INDEX/cu126 has it and does not answer; set LORA_DIST_TORCH to a wheel"
    else
        say "torch: $TORCH_VERSION for CUDA, compute capability $capability (some 3 GB)"
        pip_install "torch==$TORCH_VERSION"
    fi
}

# From PyTorch's own index, which serves one build a folder. Fails fast where it cannot be reached.
install_from_pytorch() {
    .venv/bin/python - "$PYTORCH_INDEX/$1/torch/" 2>/dev/null <<'PY' || return 1
import sys
import urllib.request
urllib.request.urlopen(sys.argv[1], timeout=10).close()
PY
    pip_install --index-url "$PYTORCH_INDEX/$1" "torch==$TORCH_VERSION+$1"
}

main() {
    local wanted done_before
    make_venv
    wanted=$(fingerprint | sha256sum)
    for done_before in ".venv/installed-${EXTRA:-base}" .venv/installed-dev; do # dev holds the base
        if [ -f "$done_before" ] && [ "$(cat "$done_before")" = "$wanted" ]; then
            say "up to date"
            return
        fi
    done
    install_torch
    say "lora_dist and what it needs, at the versions of $PINS"
    pip_install --constraint "$PINS" --editable ".${EXTRA:+[$EXTRA]}"
    printf '%s' "$wanted" >".venv/installed-${EXTRA:-base}"
    say "done"
}

main
