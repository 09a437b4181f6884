"""Megatron-core, imported nowhere else: the model's shards, the LoRA linears in them, weights, the schedule."""

import warnings

# Remarks while it loads about packages that it can do without.
warnings.filterwarnings("ignore", module=r"megatron\.core")
