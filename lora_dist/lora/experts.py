"""The adapters of the experts of a layer: one pair of factors an expert, stored one after the other.

Shapes: E experts, R rows that experts see, ordered by expert, X input features, Y output features, K the summed ranks
of the adapters on one linear.
"""

from collections.abc import Sequence

import torch

from lora_dist.lora.layer import LoraShard
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

    def stack_by_expert(self, dtype: torch.dtype) -> Factors:
        """B in blocks on each adapter's rows, as `stack_factors` makes it."""
        pairs = [self.factors(spec) for spec in self.specs]
        a_EKX = torch.cat([a.view(self.num_experts, -1, a.shape[1]) for a, _ in pairs], dim=1)
        bs = [
            (b * spec.scaling).view(len(b), self.num_experts, -1).transpose(0, 1)
            for (_, b), spec in zip(pairs, self.specs, strict=True)
        ]
        if self.stacked_rows is None:
            return a_EKX.to(dtype), bs[0].to(dtype)
        b_EYK = bs[0].new_zeros(self.num_experts, self.local_out_features, a_EKX.shape[1])
        first = 0
        for b, (_, rows) in zip(bs, self.list_rows(), strict=True):
            assert rows is not None
            b_EYK[:, rows, first : first + b.shape[2]] = b
            first += b.shape[2]
        return a_EKX.to(dtype), b_EYK.to(dtype)

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


def add_updates(products_RY: torch.Tensor, rows_RX: torch.Tensor, factors: Factors, counts: list[int]) -> torch.Tensor:
    """Add x A^T B^T to each row's product, in place; z = x A^T [K, R], which backward needs."""
    zs = []
    for rows, products, a_KX, b_YK in zip(rows_RX.split(counts), products_RY.split(counts), *factors, strict=True):
        zs.append(a_KX @ rows.t())
        products.addmm_(zs[-1].t(), b_YK.t())
    return torch.cat(zs, dim=1)


def compute_factor_grads(
    dproducts_RY: torch.Tensor, rows_RX: torch.Tensor, z_KR: torch.Tensor, factors: Factors, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz [K, R], dA and dB; zeros for an expert without rows."""
    dzs, das, dbs = [], [], []
    blocks = zip(dproducts_RY.split(counts), rows_RX.split(counts), z_KR.split(counts, dim=1), factors[1], strict=True)
    for dproducts, rows, z, b_YK in blocks:
        dzs.append(b_YK.t() @ dproducts.t())
        das.append(dzs[-1] @ rows)
        dbs.append((z @ dproducts).t())
    return torch.cat(dzs, dim=1), torch.stack(das), torch.stack(dbs)


def add_input_grads(drows_RX: torch.Tensor, dz_KR: torch.Tensor, a_EKX: torch.Tensor, counts: Sequence[int]) -> None:
    """Add dz A to each row's, in place."""
    for drows, dz, a_KX in zip(drows_RX.split(counts), dz_KR.split(counts, dim=1), a_EKX, strict=True):
        drows.addmm_(dz.t(), a_KX)
