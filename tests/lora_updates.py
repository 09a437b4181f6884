"""What a shard's adapters add to its weight, as one matrix: nothing in the library ever forms it."""

import torch

from lora_dist.lora.layer import LoraShard


def compute_update(shard: LoraShard) -> torch.Tensor:
    """(alpha / lora_rank) B A [O, H], fp32."""
    a_RH, b_OR = shard.stack_factors(torch.float32)
    return b_OR @ a_RH
