"""Megatron-core: the model's shards, the LoRA linears inside them, weights in, the schedule. The only importer of megatron."""
