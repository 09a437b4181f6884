"""DeepSpeed ZeRO: optimizer state (and gradients, parameters) partitioned over DP. The only importer of deepspeed."""
