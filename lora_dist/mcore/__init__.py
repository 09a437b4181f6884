"""Megatron-core, imported nowhere else: the model's shards, the LoRA linears in them, weights, the schedule."""

import warnings

# Remarks while it loads about packages that it can do without.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# Of collectives whose names torch 2.13 changes: the older ones are what Megatron, DeepSpeed and older torch know.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
