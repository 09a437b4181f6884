"""Numbers of steps out of numbers of epochs, once it is known how many rows an epoch has."""

import math
from dataclasses import replace

from lora_dist.config import LoopConfig, OptimConfig, compute_num_microbatches


def settle_epochs(
    loop: LoopConfig, optim: OptimConfig, *, rows_per_epoch: int, dp_size: int
) -> tuple[LoopConfig, OptimConfig]:
    """Both with nothing left in epochs or in shares of the run.

    An epoch of `rows_per_epoch` rows need not be whole steps: its last rows share one with the next epoch's first.
    """
    global_batch_size = loop.micro_batch_size * dp_size * compute_num_microbatches(loop, dp_size)

    def count(epochs: float | None, steps: int) -> int:
        if epochs is None:
            return steps
        return max(1, math.ceil(round(epochs * rows_per_epoch / global_batch_size, 6)))  # 1.1 x 10 is a little over 11

    num_steps = loop.total_steps if loop.num_epochs is None else count(loop.num_epochs, 0)
    settled = replace(
        loop,
        num_steps=num_steps,
        num_epochs=None,
        eval_every=count(loop.eval_every_epochs, loop.eval_every),
        eval_every_epochs=None,
        save_every=count(loop.save_every_epochs, loop.save_every),
        save_every_epochs=None,
    )
    if optim.warmup_ratio is None:
        return settled, optim
    return settled, replace(optim, num_warmup_steps=round(optim.warmup_ratio * num_steps), warmup_ratio=None)
