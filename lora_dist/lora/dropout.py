"""LoRA dropout whose mask is a function of (seed, step, row, position, feature, adapter): the same at every topology.

Hashing instead of drawing lets each rank compute just its slice, and backward compute it again instead of keeping it.
Shapes: S sequence, B rows, H features.
"""

from dataclasses import dataclass

import torch

from lora_dist.fusion import Chain
from lora_dist.lora.factors import derive_seed
from lora_dist.row_shard import WHOLE_ROW, RowShard


def compute_row_keys(row_ids_B: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """int64 [B]; tell the rows, given by their numbers within the global batch, from those of all other steps.

    A tensor, so that a recorded step can have another one written in its place.
    """
    return _mix64(row_ids_B + derive_seed(seed, "dropout", step) % 2**40)


class DropoutClock:
    """What a model's adapters have to know of the microbatch that is running forward."""

    def __init__(self) -> None:
        self.row_keys_B: torch.Tensor | None = None
        """Of `compute_row_keys`, on the device; None outside training."""
        self.adapter_of_row: tuple[int | None, ...] = ()
        """Where several adapters are attached: each row's, None for the base alone."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DropoutMask:
    """The mask of one adapter's input, computed on demand."""

    row_keys_B: torch.Tensor
    adapter_name: str
    probability: float
    row_shard: RowShard = WHOLE_ROW
    """What the ranks of this tensor-parallel group have of each row."""
    num_positions: int = 0
    """So many of it; tells something where that is not the whole row."""
    position_offset: int = 0
    """First of them that is this rank's, under sequence parallelism."""
    feature_offset: int = 0
    """First feature of this rank's input shard."""

    def apply(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """x where kept, scaled by 1 / (1 - p), else 0."""
        return _drop(x_SBH, *self._hash_places(x_SBH.shape, x_SBH.device), self.probability)

    def _hash_places(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int32, of each token [S, B] and of each feature [H]."""
        S, _, H = shape
        seed = derive_seed("dropout", self.adapter_name)
        position_S = self.row_shard.find_positions(self.position_offset, S, self.num_positions, device)
        feature_H = torch.arange(self.feature_offset, self.feature_offset + H, device=device)
        token_SB = _mix64(_mix64(self.row_keys_B + seed % 2**40)[None, :] + position_S[:, None])
        feature_H = _mix64(feature_H + seed // 2**40)
        return token_SB.to(torch.int32), feature_H.to(torch.int32)


@Chain
def _drop(x_SBH: torch.Tensor, token_SB: torch.Tensor, feature_H: torch.Tensor, probability: float) -> torch.Tensor:
    mixed_SBH = _mix32(token_SB[:, :, None] ^ feature_H)
    keep_SBH = (mixed_SBH & 0x7FFFFFFF) >= round(probability * 2**31)
    return x_SBH * keep_SBH.to(x_SBH.dtype).mul_(1.0 / (1.0 - probability))


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 that spreads every bit (multiply and fold, wrapping)."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 31)) * -4658895280553007687
    return x ^ (x >> 29)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The same for int32, in place: it runs over every element of the mask."""
    x ^= x >> 15
    x *= 739790447
    x ^= x >> 14
    x *= -1640531527
    x ^= x >> 16
    return x
