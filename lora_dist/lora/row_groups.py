"""Products of rows that are ordered by expert with what each expert has: one call a product, or one an expert.

Shapes: E experts, R rows, X and Y features.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.lora.function import BaseWeight, read_weight

ExpertWeights = torch.Tensor | nn.ModuleList
"""Of one linear of all experts: [E, O, H], or a quantised weight each."""
GROUPED_MULTIPLE = 8
"""Rows of 16-bit numbers that a grouped product reads begin at multiples of 16 bytes."""


def can_group(dtype: torch.dtype, *features: int, on_gpu: bool) -> bool:
    """Whether there is one kernel for all experts' products: torch.nn.functional.grouped_mm has bf16 on GPUs."""
    return on_gpu and dtype == torch.bfloat16 and all(size % GROUPED_MULTIPLE == 0 for size in features)


def split_weights(weights: ExpertWeights) -> list[BaseWeight]:
    """Each expert's [O, H]."""
    return cast(list[BaseWeight], list(weights))


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Where each expert's rows end, and how many it has where its products are calls of their own."""

    ends_E: torch.Tensor
    """int32, on the device."""
    counts: list[int] | None
    """None: nobody waits for the device to know them."""

    @staticmethod
    def find(sorted_choices_R: torch.Tensor, num_experts: int, *, grouped: bool) -> "RowGroups":
        """Out of each row's expert, ascending. Not grouped, the host waits for the numbers."""
        experts_E = torch.arange(num_experts, device=sorted_choices_R.device)
        ends_E = torch.searchsorted(sorted_choices_R, experts_E, right=True, out_int32=True)
        return RowGroups(ends_E, None if grouped else _read_counts(ends_E, len(sorted_choices_R)))

    def multiply(
        self,
        rows_RX: torch.Tensor,
        weights: ExpertWeights,
        *,
        transposed: bool = False,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[R, Y]: each expert's rows times its weight [X, Y], or [Y, X] where `transposed`; into `add_to`, in place."""
        if self.counts is None:
            assert isinstance(weights, torch.Tensor), "quantised weights are dequantised one by one"
            product_RY = F.grouped_mm(rows_RX, weights.mT if transposed else weights, offs=self.ends_E)
            return product_RY if add_to is None else add_to.add_(product_RY)
        of_experts, sum_RY = split_weights(weights), add_to
        if sum_RY is None:
            sum_RY = rows_RX.new_empty(len(rows_RX), of_experts[0].shape[0 if transposed else 1])
        for rows, product, weight in zip(*self._split(rows_RX, sum_RY), of_experts, strict=True):
            if len(rows) == 0:
                continue
            matrix = read_weight(weight, rows.dtype)
            matrix = matrix.t() if transposed else matrix
            if add_to is None:
                torch.mm(rows, matrix, out=product)
            else:
                product.addmm_(rows, matrix)
        return sum_RY

    def multiply_outer(self, rows_RY: torch.Tensor, rows_RX: torch.Tensor) -> torch.Tensor:
        """[E, Y, X], the sum of its rows' outer products; zeros for an expert without rows."""
        if self.counts is None:
            return F.grouped_mm(rows_RY.t(), rows_RX, offs=self.ends_E)
        outer_EYX = rows_RX.new_empty(len(self.counts), rows_RY.shape[1], rows_RX.shape[1])
        for left, right, outer in zip(*self._split(rows_RY, rows_RX), outer_EYX, strict=True):
            torch.mm(left.t(), right, out=outer)
        return outer_EYX

    def _split(self, *rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        assert self.counts is not None
        return [one.split(self.counts) for one in rows]


def _read_counts(ends_E: torch.Tensor, num_rows: int) -> list[int]:
    """Where a plan's tensors hold nothing each expert has as many rows as any other, or one more."""
    if ends_E.is_meta:
        share, rest = divmod(num_rows, len(ends_E))
        return [share + (expert < rest) for expert in range(len(ends_E))]
    counts: list[int] = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return counts
