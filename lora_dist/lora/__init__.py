"""LoRA itself, in plain torch: targets, factors, dropout, the fused linear, merging."""
