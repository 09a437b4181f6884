#!/usr/bin/env bash
# One verb on several nodes that share this checkout. (Under Slurm use slurm/ instead.)
#
# On every node, through torchrun:
#   NNODES=2 GPUS_PER_NODE=8 MASTER_ADDR=node0 bash launch/multinode.sh train experiment=... run_dir=runs/x
# On one node, through DeepSpeed's launcher and a hostfile of lines `node0 slots=8`:
#   HOSTFILE=hosts.txt bash launch/multinode.sh train experiment=... run_dir=runs/x
#
# run_dir must be given and lie on a file system that all nodes see.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
set +u # a site's modules may read what is not set
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh"
set -u
export PATH="$ROOT/.venv/bin:$PATH"

# Lines of the hostfile but for comments and empty ones.
count_nodes() { { grep -E '^[[:space:]]*[^#[:space:]]' "$HOSTFILE" || true; } | wc -l; }

# DeepSpeed on the nodes of the hostfile, with this environment's settings and the words as they are. Does not return.
run_through_shells() {
    local word code
    local -a words=()
    for word in "$@"; do
        add_quoted "$word"
    done
    # Beside the nodes' checkout, which they share, and for the user alone.
    SETTINGS=$(mktemp -d "$ROOT/.lora_dist-env-XXXXXX")
    trap 'rm -rf "$SETTINGS"' EXIT
    trap 'kill -TERM $(jobs -p) 2>/dev/null || exit 143' HUP INT TERM
    write_settings
    DS_ENV_FILE="$SETTINGS/exports" "${DEEPSPEED[@]}" "${JOB[@]}" "${words[@]}" &
    while :; do # a signal ends a wait, not DeepSpeed, which first ends its processes
        code=0
        wait "$!" || code=$?
        kill -0 "$!" 2>/dev/null || exit "$code"
    done
}

# Adds to `words` what the nodes' shells read as $1. DeepSpeed puts a word with spaces between double quotes and escapes
# those in it, and leaves other words bare; pdsh puts a host's name, say, for %h, and % for %%.
add_quoted() {
    local word=${1//%/%%} escaped="'\\''"
    if [[ $word == *" "* ]]; then
        word=${word//\\/"\\\\"}
        word=${word//\$/"\\\$"}
        words+=("${word//\`/"\\\`"}")
    else
        words+=("'${word//"'"/"$escaped"}'")
    fi
}

# DeepSpeed's file of exports: a shell's `NAME=value` lines, which it logs and pdsh lists among the processes. So each
# names a file that holds the value. The user's own files of the kind come last and win.
write_settings() {
    local name folder own="${DS_ENV_FILE:-.deepspeed_env}"
    for name in $(list_settings); do
        printf '%s' "${!name}" >"$SETTINGS/$name"
        printf "%s=\$(cat '%s')\n" "$name" "$SETTINGS/$name"
    done >"$SETTINGS/exports"
    for folder in ~ .; do
        (cd "$folder" && [ -f "$own" ] && grep '=' -- "$own" >>"$SETTINGS/exports") || true
    done
}

# What launch/env.sh sets, and what else libraries are told by. DeepSpeed itself passes on NCCL's and Python's.
list_settings() {
    local site
    site=$(sed -nE 's/^ *export ([A-Za-z_0-9]+)=.*/\1/p' "$ROOT/launch/env.sh" | paste -sd '|')
    compgen -e | grep -ixE "$site|(CUDA|GLOO|HF|LORA_DIST|OMP|PYTORCH|TOKENIZERS|TORCH|TRANSFORMERS|TRITON|WANDB)_.*|\
ld_library_path|netrc|(https?|no)_proxy"
}

if [ $# -eq 0 ] || ! command -v lora-dist >/dev/null; then
    printf 'error: run `bash launch/install.sh` once, then `bash launch/multinode.sh VERB key=value ...`\n' >&2
    exit 2
fi
if [ -n "${HOSTFILE:-}" ]; then
    if [ ! -r "$HOSTFILE" ]; then # DeepSpeed would run on this node alone
        printf 'error: HOSTFILE=%s cannot be read; give the path of a file of lines `node0 slots=8`\n' "$HOSTFILE" >&2
        exit 2
    fi
    DEEPSPEED=(deepspeed --hostfile "$HOSTFILE" --no_local_rank)
    JOB=(--module lora_dist.cli.main)
    # DeepSpeed starts the processes of one node here and itself, those of several through pdsh and the nodes' shells.
    if [ "$(count_nodes)" -gt 1 ]; then
        run_through_shells "$@"
    fi
    exec "${DEEPSPEED[@]}" --no_ssh_check --master_addr 127.0.0.1 "${JOB[@]}" "$@"
fi
exec torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv-id "${JOB_ID:-lora_dist}" \
    -m lora_dist.cli.main "$@"
