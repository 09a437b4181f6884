"""The adapters of the experts of a layer: one pair of factors an expert, stored one after the other.

Shapes: E experts, R rows that experts see, ordered by expert, X input features, Y output features, K the summed ranks
of the adapters on one linear.
"""

import torch
import torch.nn.functional as F

from lora_dist.lora.layer import LoraShard
from lora_dist.lora.row_groups import RowGroups
from lora_dist.lora.spec import AdapterSpec

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [E, K, X] and B [E, Y, K], scaled: x A^T B^T is an expert's whole update."""


class ExpertShard(LoraShard):
    """The adapters of the experts' first linears, or of their second ones, on one tensor-parallel shard.

    They are applied where the experts' rows are known (`lora_dist.mcore.mixing`), not by calling this module.
    """

    @property
    def num_experts(self) -> int:
        assert self.specs[0].num_experts is not None
        return self.specs[0].num_experts

    def stack_by_expert(self, dtype: torch.dtype, *, multiple_of: int = 1) -> Factors:
        """B in blocks on each adapter's rows, as `stack_factors` makes it. Zeros fill K up to a multiple."""
        a_EKX, b_EYK = self._stack()
        missing = -a_EKX.shape[1] % multiple_of
        if missing:
            a_EKX, b_EYK = F.pad(a_EKX, (0, 0, 0, missing)), F.pad(b_EYK, (0, missing))
        return a_EKX.to(dtype), b_EYK.to(dtype)

    def _stack(self) -> Factors:
        pairs = [self.factors(spec) for spec in self.specs]
        a_EKX = torch.cat([a.view(self.num_experts, -1, a.shape[1]) for a, _ in pairs], dim=1)
        bs = [
            (b * spec.scaling).view(len(b), self.num_experts, -1).transpose(0, 1)
            for (_, b), spec in zip(pairs, self.specs, strict=True)
        ]
        if self.stacked_rows is None:
            return a_EKX, bs[0].contiguous()  # lies as experts' weights do
        b_EYK = bs[0].new_zeros(self.num_experts, self.local_out_features, a_EKX.shape[1])
        first = 0
        for b, (_, rows) in zip(bs, self.list_rows(), strict=True):
            assert rows is not None
            b_EYK[:, rows, first : first + b.shape[2]] = b
            first += b.shape[2]
        return a_EKX, b_EYK

    def list_experts(self) -> list["ExpertAdapter"]:
        """What each expert's own weight is merged with."""
        return [ExpertAdapter(self, expert) for expert in range(self.num_experts)]


class ExpertAdapter:
    """One expert's part of a shard, to be merged as a LoraShard is."""

    def __init__(self, shard: ExpertShard, expert: int) -> None:
        self._shard, self._expert = shard, expert

    def list_rows(self) -> list[tuple[AdapterSpec, torch.Tensor | None]]:
        return self._shard.list_rows()

    @torch.no_grad()
    def compute_merged(self, spec: AdapterSpec, base_OH: torch.Tensor) -> torch.Tensor:
        """As `LoraShard.compute_merged`; communicates nothing."""
        (a, b), dtype = self._shard.factors(spec), torch.promote_types(base_OH.dtype, torch.float32)
        own = slice(self._expert * spec.lora_rank, (self._expert + 1) * spec.lora_rank)
        return torch.addmm(base_OH.to(dtype), (b[:, own] * spec.scaling).to(dtype), a[own].to(dtype))


def add_updates(products_RY: torch.Tensor, rows_RX: torch.Tensor, factors: Factors, groups: RowGroups) -> torch.Tensor:
    """Add x A^T B^T to each row's product, in place; z = x A^T [R, K], which backward needs."""
    a_EKX, b_EYK = factors
    z_RK = groups.multiply(rows_RX, a_EKX, transposed=True)
    groups.multiply(z_RK, b_EYK, transposed=True, add_to=products_RY)
    return z_RK


def compute_factor_grads(
    dproducts_RY: torch.Tensor, rows_RX: torch.Tensor, z_RK: torch.Tensor, b_EYK: torch.Tensor, groups: RowGroups
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz [R, K], dA and dB; zeros for an expert without rows."""
    dz_RK = groups.multiply(dproducts_RY, b_EYK)
    return dz_RK, groups.multiply_outer(dz_RK, rows_RX), groups.multiply_outer(dproducts_RY, z_RK)
