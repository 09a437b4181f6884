"""Rows split over processes, and what passes between those: whole rows gathered, sums scattered, positions for heads.

Shapes: S positions of a row, P those of this process, B rows, G heads of this TP rank, g those that one of the
processes takes, X any features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lora_dist.row_shard import RowShard, number_parts, order_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """The processes that a row is split over, and this one's parts."""

    group: dist.ProcessGroup
    shard: RowShard

    def gather(self, x_PBX: torch.Tensor) -> torch.Tensor:
        """[S, B, X] in the row's order. Not for autograd."""
        gathered = x_PBX.new_empty(self.shard.cp_size * len(x_PBX), *x_PBX.shape[1:])
        dist.all_gather_into_tensor(gathered, x_PBX.contiguous(), group=self.group)
        return _take_parts(gathered, order_parts(self.shard.cp_size))

    def scatter_sums(self, x_SBX: torch.Tensor) -> torch.Tensor:
        """[P, B, X]: the sums over the processes at this one's positions. Not for autograd."""
        summed = x_SBX.new_empty(len(x_SBX) // self.shard.cp_size, *x_SBX.shape[1:])
        dist.reduce_scatter_tensor(summed, _take_parts(x_SBX, number_parts(self.shard.cp_size)), group=self.group)
        return summed

    def exchange_for_heads(self, x_PBGX: torch.Tensor) -> torch.Tensor:
        """[S, B, g, X]: of whole rows this process's heads, the cp_rank'th of as many as there are processes."""
        output: torch.Tensor = _Exchange.apply(x_PBGX, self, True)  # type: ignore[no-untyped-call]
        return output

    def exchange_for_positions(self, x_SBgX: torch.Tensor) -> torch.Tensor:
        """[P, B, G, X]: the other way round."""
        output: torch.Tensor = _Exchange.apply(x_SBgX, self, False)  # type: ignore[no-untyped-call]
        return output

    def take_heads(self, x_GX: torch.Tensor) -> torch.Tensor:
        """[g, ...]: what those heads have of a parameter that lies head by head."""
        return x_GX.chunk(self.shard.cp_size)[self.shard.cp_rank]


class _Exchange(torch.autograd.Function):
    """To heads or to positions; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row_group: RowGroup, to_heads: bool) -> torch.Tensor:
        ctx.row_group, ctx.to_heads = row_group, to_heads
        return _exchange(x, row_group, to_heads=to_heads)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _exchange(dx, ctx.row_group, to_heads=not ctx.to_heads), None, None


def _exchange(x: torch.Tensor, row_group: RowGroup, *, to_heads: bool) -> torch.Tensor:
    return (_exchange_for_heads if to_heads else _exchange_for_positions)(x, row_group)


def _exchange_for_heads(x_PBGX: torch.Tensor, row_group: RowGroup) -> torch.Tensor:
    cp_size = row_group.shard.cp_size
    sent = torch.stack(x_PBGX.chunk(cp_size, dim=2))  # for each process its heads
    received = torch.empty_like(sent)  # of each process its positions
    dist.all_to_all_single(received, sent, group=row_group.group)
    return _take_parts(received.flatten(0, 1), order_parts(cp_size))


def _exchange_for_positions(x_SBgX: torch.Tensor, row_group: RowGroup) -> torch.Tensor:
    cp_size = row_group.shard.cp_size
    sent = _take_parts(x_SBgX, number_parts(cp_size)).unflatten(0, (cp_size, -1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=row_group.group)
    return torch.cat(received.unbind(), dim=2)


def _take_parts(x_SBX: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """Its equal parts, as many as are named, in that order."""
    chunks = x_SBX.chunk(len(parts))
    return torch.cat([chunks[part] for part in parts])
