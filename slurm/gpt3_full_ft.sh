#!/bin/bash
# Full fine-tuning of GPT-3 175B, on nodes of eight V100-32GB.
#
#   sbatch slurm/gpt3_full_ft.sh model.checkpoint=DIR data.train=FILE [key=value ...]     (from the checkout)
#
# Options of sbatch before the script's name win over those below: sbatch --nodes=32 --time=4:00:00 slurm/gpt3_full_ft.sh ...
#SBATCH --job-name=gpt3_full_ft
#SBATCH --nodes=24
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
# Slurm runs a copy of this file, so $0 does not say where the checkout is.
export LORA_DIST_ROOT="${LORA_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
source "$LORA_DIST_ROOT/slurm/lib.sh" || {
    printf 'error: submit from the checkout, or set LORA_DIST_ROOT to it\n' >&2
    exit 2
}
run_job train gpt3_175b_v100_full method=full "$@"
