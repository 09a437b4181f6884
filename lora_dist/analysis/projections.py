"""How a frozen weight in tensor-parallel shards acts on given directions; only thin matrices are communicated.

Shapes: O and H are the whole weight's output and input features, o and h this shard's, K a number of directions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

_NUM_EXTRA = 8
"""Directions iterated beyond those asked for, so that the last of them settles too."""
_NUM_ITERATIONS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightShard:
    """One target's weight, split over TP along its output features (column-parallel) or its input features."""

    weight_oh: torch.Tensor
    """fp32 or wider."""
    column_parallel: bool
    tp_rank: int
    group: dist.ProcessGroup | None
    """None where one process has it all."""

    def project(self, u_OK: torch.Tensor, v_HK: torch.Tensor) -> torch.Tensor:
        """U^T W V [K, K], the same on every rank: the sum over TP of what the shards give."""
        u, v = u_OK.to(self.weight_oh), v_HK.to(self.weight_oh)
        if self.column_parallel:
            u = self._cut(u)
        else:
            v = self._cut(v)
        return self._sum(u.t() @ (self.weight_oh @ v))

    def compute_norm(self) -> float:
        """Frobenius norm of the whole weight."""
        return float(self._sum(self.weight_oh.square().sum()).sqrt())

    def compute_top_values(self, num_values: int, seed: int) -> torch.Tensor:
        """Its largest singular values [K], by subspace iteration (Halko et al. 2011, arXiv:0909.4061, section 4.5)."""
        rows = self.weight_oh if self.column_parallel else self.weight_oh.t()
        num_directions = min(num_values + _NUM_EXTRA, rows.shape[1])
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(rows.shape[1], num_directions, generator=generator).to(rows)
        for _ in range(_NUM_ITERATIONS):
            basis, _ = torch.linalg.qr(self._sum(rows.t() @ (rows @ basis)))
        image = rows @ basis
        squares: torch.Tensor = torch.linalg.eigvalsh(self._sum(image.t() @ image).double())
        return squares.flip(0)[:num_values].clamp(min=0.0).sqrt()

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        size = self.weight_oh.shape[0 if self.column_parallel else 1]
        return whole.narrow(0, self.tp_rank * size, size)

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part


def draw_directions(num_features: int, num_directions: int, seed: int) -> torch.Tensor:
    """Orthonormal columns [num_features, K] in no particular direction, fp64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_features, num_directions, generator=generator, dtype=torch.float64)
    columns: torch.Tensor = torch.linalg.qr(drawn).Q
    return columns
