"""Slots, the positions that trained vectors take, as negative tokens until a batch is made.

So they have their part in whatever counts tokens: lengths, packing, positions, prompts. Slot n, counted from 1, is
token -1 - n; -1 stays free for what stands for no token.
"""

import torch

from lora_dist.prefix_config import PrefixConfig


def list_slots(config: PrefixConfig | None) -> tuple[list[int], list[int]]:
    """Before the context, and before the target; none where the method has none."""
    if config is None:
        return [], []
    tokens = [-1 - number for number in range(1, config.num_slots + 1)]
    return tokens[: config.num_prefix], tokens[config.num_prefix :]


def split_slots(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that an embedding can look up, 0 at the slots, and the slots' numbers, 0 at the tokens; in its shape."""
    return tokens.clamp(min=0), (-1 - tokens).clamp(min=0)
