"""Products of rows that are ordered by expert with what each expert has: one call a product, or one an expert.

Shapes: E experts, R rows, X and Y features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_dist.lora.function import BaseWeight, read_weight
from lora_dist.quant.weight import QuantizedWeight

ExpertWeights = BaseWeight
"""Of one linear of all experts: [E, O, H], or what is dequantised to it."""
GROUPED_MULTIPLE = 8
"""Rows of 16-bit numbers that a grouped product reads begin at multiples of 16 bytes."""


def can_group(dtype: torch.dtype, *features: int, on_gpu: bool) -> bool:
    """Whether there is one kernel for all experts' products: torch.nn.functional.grouped_mm has bf16 on GPUs."""
    return on_gpu and dtype == torch.bfloat16 and all(size % GROUPED_MULTIPLE == 0 for size in features)


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Where each expert's rows end, and how many it has where the host must know."""

    ends_E: torch.Tensor
    """int32, on the device."""
    counts: list[int] | None
    """None: nobody waits for the device to know them."""
    grouped: bool
    """All experts' products are one call, or one for each part of a quantised weight."""

    @staticmethod
    def find(sorted_choices_R: torch.Tensor, *weights: ExpertWeights, grouped: bool) -> "RowGroups":
        """Out of each row's expert, ascending. The host waits for the numbers where it divides rows or `weights`.

        Of quantised weights fewer rows than experts, as when a text is generated, leave most as they are.
        """
        experts_E = torch.arange(weights[0].shape[0], device=sorted_choices_R.device)
        ends_E = torch.searchsorted(sorted_choices_R, experts_E, right=True, out_int32=True)
        quantized = [one for one in weights if isinstance(one, QuantizedWeight)]
        grouped = grouped and (not quantized or len(sorted_choices_R) >= len(experts_E))
        counted = not grouped or any(one.is_divided for one in quantized)
        return RowGroups(ends_E, _read_counts(ends_E, len(sorted_choices_R)) if counted else None, grouped)

    def multiply(
        self,
        rows_RX: torch.Tensor,
        weights: ExpertWeights,
        *,
        transposed: bool = False,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[R, Y]: each expert's rows times its weight [X, Y], or [Y, X] where `transposed`; into `add_to`, in place."""
        if self.grouped and isinstance(weights, QuantizedWeight) and weights.is_divided:
            assert add_to is None
            return self._multiply_in_parts(rows_RX, weights, transposed=transposed)
        if self.grouped:
            whole = read_weight(weights, rows_RX.dtype)
            product_RY = F.grouped_mm(rows_RX, whole.mT if transposed else whole, offs=self.ends_E)
            return product_RY if add_to is None else add_to.add_(product_RY)
        sum_RY = add_to
        if sum_RY is None:
            sum_RY = rows_RX.new_empty(len(rows_RX), weights.shape[1 if transposed else 2])
        of_experts = weights if isinstance(weights, QuantizedWeight) else weights.unbind()
        for expert, (rows, product) in enumerate(zip(*self._split(rows_RX, sum_RY), strict=True)):
            if len(rows) == 0:
                continue
            matrix = of_experts[expert] if isinstance(of_experts, tuple) else of_experts.dequantize(rows.dtype, expert)
            matrix = matrix.t() if transposed else matrix
            if add_to is None:
                torch.mm(rows, matrix, out=product)
            else:
                product.addmm_(rows, matrix)
        return sum_RY

    def _multiply_in_parts(self, rows_RX: torch.Tensor, weights: QuantizedWeight, *, transposed: bool) -> torch.Tensor:
        """As `multiply`: of the dequantised weights no more than one part is held."""
        assert self.counts is not None
        product_RY = rows_RX.new_empty(len(rows_RX), weights.shape[1 if transposed else 2])
        end = 0
        for first in range(0, len(self.counts), weights.experts_at_once):
            experts = slice(first, first + weights.experts_at_once)
            start, end = end, end + sum(self.counts[experts])
            if start < end:
                groups = RowGroups(self.ends_E[experts] - start, self.counts[experts], grouped=True)
                product_RY[start:end] = groups.multiply(
                    rows_RX[start:end], weights.dequantize(rows_RX.dtype, experts), transposed=transposed
                )
        return product_RY

    def multiply_outer(self, rows_RY: torch.Tensor, rows_RX: torch.Tensor) -> torch.Tensor:
        """[E, Y, X], the sum of its rows' outer products; zeros for an expert without rows."""
        if self.grouped:
            return F.grouped_mm(rows_RY.t(), rows_RX, offs=self.ends_E)
        assert self.counts is not None
        outer_EYX = rows_RX.new_empty(len(self.counts), rows_RY.shape[1], rows_RX.shape[1])
        for left, right, outer in zip(*self._split(rows_RY, rows_RX), outer_EYX, strict=True):
            torch.mm(left.t(), right, out=outer)
        return outer_EYX

    def sum_rows(self, rows_RY: torch.Tensor) -> torch.Tensor:
        """[E, Y], in the same order each time."""
        if self.grouped:
            ones_RX = rows_RY.new_ones(len(rows_RY), GROUPED_MULTIPLE)
            return F.grouped_mm(ones_RX.t(), rows_RY, offs=self.ends_E)[:, 0]
        return torch.stack([rows.sum(0) for (rows,) in zip(*self._split(rows_RY), strict=True)])

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
