"""Megatron-core: the model's shards, the LoRA linears inside them, weights in, the schedule. The only importer of megatron."""

import warnings

# Remarks while it loads about packages that it can do without.
warnings.filterwarnings("ignore", module=r"megatron\.core")
