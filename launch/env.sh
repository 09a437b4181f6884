# Settings of a site, sourced by the other scripts of launch/ and slurm/. Every line is a default: what is already in
# the environment wins. Copy what your cluster needs from its documentation to the end of this file.
# shellcheck shell=bash

# One thread a process would leave cores idle, all threads in each would fight; the bare launcher shares them out.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Checkpoints and tokenizers come from local directories; nothing is fetched while training.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Megatron's tensor parallelism overlaps communication rightly only with one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# GPU memory grows in place, so that packed rows and target counts that vary leave no holes in it.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# slurm/: how often a job may be queued again, after time limits and lost nodes together.
export LORA_DIST_MAX_RESTARTS="${LORA_DIST_MAX_RESTARTS:-50}"

# multinode.sh: this job's nodes. MASTER_ADDR, the first of them, has no default here: `srun lora-dist` finds its own.
export NNODES="${NNODES:-1}"
export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

# Examples of site settings:
#   module load cuda/12.6
#   export NCCL_SOCKET_IFNAME=ib0
#   export NCCL_IB_HCA=mlx5
