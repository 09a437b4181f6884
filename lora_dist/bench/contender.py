"""What the bench asks of everything it times."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from lora_dist.batch import Batch


class Contender(Protocol):
    """A model with its optimizer, built and ready to step."""

    def step(self, batches: Sequence[Batch], step: int) -> float:
        """Forward and backward over the microbatches, clip, one AdamW step; the loss a target token before it."""
        ...

    def run_as_written(self) -> None:
        """From now on step operation by operation: a recorded graph would hide them from what counts them."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All of the model's, frozen ones too."""
        ...
