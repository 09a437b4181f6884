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
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh"
export PATH="$ROOT/.venv/bin:$PATH"

if [ $# -eq 0 ] || ! command -v lora-dist >/dev/null; then
    printf 'error: run `bash launch/install.sh` once, then `bash launch/multinode.sh VERB key=value ...`\n' >&2
    exit 2
fi
if [ -n "${HOSTFILE:-}" ]; then
    exec deepspeed --hostfile "$HOSTFILE" --no_local_rank --module lora_dist.cli.main "$@"
fi
exec torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${JOB_ID:-lora_dist}" -m lora_dist.cli.main "$@"
