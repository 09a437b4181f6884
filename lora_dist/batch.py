"""One microbatch of one replica. Shapes: B rows, S positions."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lora_dist.row_shard import RowShard

RowBlocks = tuple[tuple[int, ...], ...]
"""For each row the lengths of the parts that attend within themselves, one behind the other up to its end."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Token rows with next-token labels; equal on every process of a replica until they are cut for each."""

    input_ids_BS: torch.Tensor
    """int64; 0 at slots."""
    labels_BS: torch.Tensor
    """int64; the token that follows each input token, 0 where loss_mask is False."""
    loss_mask_BS: torch.Tensor
    """bool; True where the label is a target token."""
    position_ids_BS: torch.Tensor
    """int64; starts again at 0 with each packed example."""
    row_blocks: RowBlocks | None
    """The packed examples of each row, and its padding. None where a row holds one example."""
    row_ids_B: torch.Tensor
    """int64; the rows' numbers within the global batch, the same at every topology. Keys the LoRA dropout."""
    num_loss_tokens: int
    """Target tokens of the whole global batch over all replicas and microbatches: the loss's denominator."""
    num_tokens: int
    """Tokens of the whole global batch that are not padding."""
    adapter_of_row: tuple[int | None, ...] = ()
    """Where several adapters are attached: each row's, None for the base alone."""
    slots_BS: torch.Tensor | None = None
    """int64; at the positions of trained vectors their number, from 1, and 0 elsewhere. None where there are none."""

    def cut(self, shard: RowShard) -> "Batch":
        """What a process has of whole rows; their blocks stay whole."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.endswith("_BS")}
        parts: dict[str, Any] = {name: shard.cut(whole_BS) for name, whole_BS in values.items() if whole_BS is not None}
        return replace(self, **parts)

    @property
    def seq_len(self) -> int:
        return self.input_ids_BS.shape[1]

    def find_targets(self, multiple: int = 1) -> torch.Tensor:
        """int64 [N]; where the target tokens are in the order [S, B], -1 up to a `multiple` of places.

        On a GPU this would wait for all that runs.
        """
        targets_N = self.loss_mask_BS.t().flatten().nonzero()[:, 0]
        return F.pad(targets_N, (0, -len(targets_N) % multiple), value=-1)

    def to(self, device: torch.device) -> "Batch":
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {
            name: move(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def number_blocks(row_blocks: RowBlocks) -> torch.Tensor:
    """int64 [B, S]; each position's block, from 0 in each row."""
    rows = [torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)]) for lengths in row_blocks]
    return torch.stack(rows)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To `device`, without waiting for what runs there: from pageable memory CUDA would wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
