"""Many adapters beside one frozen linear: each row of the batch computes with its own, all rows together.

Every row gets its adapter's factors, padded with zeros to the largest rank in the batch, and the products of all
rows are one batched product. The work follows the rows and the largest rank, not how many adapters there are.

Shapes: S sequence, B rows, H input features, O output features, R rank, N adapters that the batch names.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.function import BaseWeight, ShardCommunication, frozen_linear, lora_linear
from lora_dist.lora.layer import LoraShard


class MixedLoraShard(nn.Module):
    """The shards of several adapters on one linear, in place of one adapter's `LoraShard`."""

    def __init__(self, shards: Sequence[LoraShard | None], clock: DropoutClock) -> None:
        """`shards[i]` is None where adapter i leaves this linear alone. `clock` says which row uses which adapter."""
        super().__init__()
        self.shards = nn.ModuleDict({str(index): shard for index, shard in enumerate(shards) if shard is not None})
        self.clock = clock

    def forward(
        self,
        x_SBH: torch.Tensor,
        weight_OH: BaseWeight,
        bias_O: torch.Tensor | None,
        communication: ShardCommunication,
    ) -> torch.Tensor:
        names = self._name_rows(x_SBH.shape[1])
        used = sorted({name for name in names if name in self.shards})
        if not used:
            return frozen_linear(x_SBH, weight_OH, bias_O, communication)
        a, b = self._stack(used, names, x_SBH)
        return lora_linear(x_SBH, weight_OH, bias_O, a, b, communication=communication)

    def _name_rows(self, num_rows: int) -> list[str]:
        rows = self.clock.adapter_of_row
        assert len(rows) == num_rows, f"{num_rows} rows, but adapters are chosen for {len(rows)}"
        return [str(index) for index in rows]

    def _stack(
        self, used: Sequence[str], names: Sequence[str], x_SBH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A [B, R, H] and B [B, O, R]; where all rows use the one adapter, its own [R, H] and [O, R]."""
        pairs = [self._factors(name, x_SBH.dtype) for name in used]
        if len(used) == 1 and set(names) == set(used):
            return pairs[0]
        lora_rank = max(a_RH.shape[0] for a_RH, _ in pairs)
        a_NRH = torch.stack([F.pad(a_RH, (0, 0, 0, lora_rank - a_RH.shape[0])) for a_RH, _ in pairs])
        b_NOR = torch.stack([F.pad(b_OR, (0, lora_rank - b_OR.shape[1])) for _, b_OR in pairs])
        if not set(names) <= set(used):  # rows without an adapter here take zeros
            a_NRH, b_NOR = (torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in (a_NRH, b_NOR))
        places = {name: place for place, name in enumerate(used)}
        index_B = torch.tensor([places.get(name, len(used)) for name in names], device=x_SBH.device)
        return a_NRH.index_select(0, index_B), b_NOR.index_select(0, index_B)

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shard = self.shards[name]
        assert isinstance(shard, LoraShard)
        assert not (shard.training and shard.specs[0].dropout), "rows of several adapters have no dropout of their own"
        return shard.stack_factors(dtype)
