"""The learning rate of each step."""

import math

from lora_dist.config import OptimConfig


def compute_lr(optim: OptimConfig, *, step: int, num_steps: int) -> float:
    """Learning rate of the zero-based `step`: linear warm-up, then the schedule down to zero at `num_steps`."""
    if step < optim.num_warmup_steps:
        return optim.lr * (step + 1) / optim.num_warmup_steps
    remaining = 1.0 - (step - optim.num_warmup_steps) / max(1, num_steps - optim.num_warmup_steps)
    match optim.schedule:
        case "constant":
            return optim.lr
        case "linear":
            return optim.lr * remaining
        case "cosine":
            return optim.lr * 0.5 * (1.0 - math.cos(math.pi * remaining))
    raise AssertionError(optim.schedule)
