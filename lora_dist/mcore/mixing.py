"""The product of a layer's experts: each token's rows through the experts its router picked, weighted and added up.

Shapes: H hidden, E experts, C experts of a token, T tokens, R = T C rows that experts see, ordered by expert, F
features of an expert on this rank, K the summed ranks of the adapters on one linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lora_dist.lora.experts import Factors, add_input_grads, add_updates, compute_factor_grads
from lora_dist.lora.function import BaseWeight, read_weight
from lora_dist.mcore.gates import compute_gated, compute_weighted_grad

ExpertWeights = torch.Tensor | nn.ModuleList
"""Of one linear of all experts: [E, O, X], or a quantised weight each."""


def list_experts(weights: ExpertWeights) -> list[BaseWeight]:
    """Each expert's [O, X]."""
    return cast(list[BaseWeight], list(weights))


def mix_experts(
    tokens_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    choices_TC: torch.Tensor,
    first: ExpertWeights,
    second: ExpertWeights,
    first_factors: Factors | None = None,
    second_factors: Factors | None = None,
) -> torch.Tensor:
    """[T, H]: of each token the sum of its experts' outputs, by weight; this rank's summand of it.

    `first` is [2F, H] of each expert and `second` [H, F]: W2 (silu(gate) * up), [gate | up] = W1 x. The factors are the
    adapters' of W1 and of W2.
    """
    factors = [*(first_factors or (None, None)), *(second_factors or (None, None))]
    mixed_TH: torch.Tensor = _MixedExperts.apply(  # type: ignore[no-untyped-call]
        tokens_TH, weights_TC, choices_TC, first, second, *factors
    )
    return mixed_TH


class _MixedExperts(torch.autograd.Function):
    """Keeps [gate | up] of every row, and the tokens where the first linears or their adapters train; no output of an
    expert.

    A row's weight multiplies what enters the second linear. So its gradient is a product of that with what the linear
    hands back, and the expert's output is not needed for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens_TH: torch.Tensor,
        weights_TC: torch.Tensor,
        choices_TC: torch.Tensor,
        first: ExpertWeights,
        second: ExpertWeights,
        first_a: torch.Tensor | None,
        first_b: torch.Tensor | None,
        second_a: torch.Tensor | None,
        second_b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.first, ctx.second, ctx.are_trained = first, second, ctx.needs_input_grad[3]
        ctx.counts = _count_rows(choices_TC, len(first))
        order_R = choices_TC.flatten().argsort(stable=True)
        weights_R = weights_TC.flatten()[order_R]
        rows_RH = tokens_TH.index_select(0, order_R // weights_TC.shape[1])
        gate_up_R2F, first_z = _apply(rows_RH, first, (first_a, first_b), ctx.counts)
        del rows_RH
        inner_RF = compute_gated(gate_up_R2F, False).mul_(weights_R[:, None])
        products_RH, second_z = _apply(inner_RF, second, (second_a, second_b), ctx.counts)
        kept_TH = tokens_TH if ctx.are_trained or first_a is not None else None
        adapters = first_a, first_b, first_z, second_a, second_b, second_z
        ctx.save_for_backward(kept_TH, gate_up_R2F, weights_R, order_R, *adapters)
        return _sum_of_tokens(products_RH, order_R, tokens_TH)

    @staticmethod
    def backward(ctx: Any, dmixed_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        tokens_TH, gate_up_R2F, weights_R, order_R, *adapters = ctx.saved_tensors
        num_choices, (needs_tokens, needs_weights) = len(order_R) // len(dmixed_TH), ctx.needs_input_grad[:2]
        drows_RH = dmixed_TH.index_select(0, order_R // num_choices)
        inner_RF = None
        if ctx.are_trained or adapters[3] is not None:
            inner_RF = compute_gated(gate_up_R2F, False).mul_(weights_R[:, None])
        needs_inner = needs_tokens or needs_weights or tokens_TH is not None
        second = _differentiate(ctx, drows_RH, inner_RF, ctx.second, adapters[3:], needs_input=needs_inner)
        del drows_RH, inner_RF
        if second.dinput is None:
            return None, None, None, None, None, None, None, *second.factors
        dgate_up_R2F, dweights_R = compute_weighted_grad(second.dinput, gate_up_R2F, weights_R)
        second.dinput = None
        rows_RH = None if tokens_TH is None else tokens_TH.index_select(0, order_R // num_choices)
        first = _differentiate(ctx, dgate_up_R2F, rows_RH, ctx.first, adapters[:3], needs_input=needs_tokens)
        del rows_RH
        dtokens_TH = None if first.dinput is None else _sum_of_tokens(first.dinput, order_R, dmixed_TH)
        dweights_TC = torch.empty_like(dweights_R).index_copy_(0, order_R, dweights_R).view(-1, num_choices)
        return dtokens_TH, dweights_TC, None, first.weights, second.weights, *first.factors, *second.factors


def _apply(
    rows_RX: torch.Tensor, weights: ExpertWeights, factors: Sequence[torch.Tensor | None], counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row through its expert's linear and the adapters on it, and what of these is needed again."""
    products_RY, (a, b) = _multiply(rows_RX, weights, counts, transposed=True), factors
    return products_RY, None if a is None or b is None else add_updates(products_RY, rows_RX, (a, b), counts)


@dataclass(slots=True)
class _Grads:
    """Of one linear of all experts."""

    dinput: torch.Tensor | None
    factors: Sequence[torch.Tensor | None]
    """Of A and of B."""
    weights: torch.Tensor | None
    """[E, O, X], where they train."""


def _differentiate(
    ctx: Any,
    dproducts_RY: torch.Tensor,
    rows_RX: torch.Tensor | None,
    weights: ExpertWeights,
    adapters: Sequence[torch.Tensor | None],
    *,
    needs_input: bool,
) -> _Grads:
    """The backward of `_apply`; `adapters` are A, B and z, `rows_RX` is None where nothing here trains."""
    (a, b, z_KR), counts = adapters, ctx.counts
    grads = _Grads(_multiply(dproducts_RY, weights, counts) if needs_input else None, (None, None), None)
    if rows_RX is not None and ctx.are_trained:
        grads.weights = _multiply_outer(dproducts_RY, rows_RX, counts)
    if a is not None and b is not None and z_KR is not None:
        assert rows_RX is not None
        dz_KR, *grads.factors = compute_factor_grads(dproducts_RY, rows_RX, z_KR, (a, b), counts)
        if grads.dinput is not None:
            add_input_grads(grads.dinput, dz_KR, a, counts)
    return grads


def _count_rows(choices_TC: torch.Tensor, num_experts: int) -> list[int]:
    """Of each expert. Where a plan's tensors hold no choices each has as many as any other, or one more."""
    if choices_TC.is_meta:
        share, rest = divmod(choices_TC.numel(), num_experts)
        return [share + (expert < rest) for expert in range(num_experts)]
    counts: list[int] = choices_TC.flatten().bincount(minlength=num_experts).tolist()
    return counts


def _multiply(
    rows_RX: torch.Tensor, weights: ExpertWeights, counts: list[int], *, transposed: bool = False
) -> torch.Tensor:
    """[R, Y]: each expert's rows times its weight [X, Y], or [Y, X] where `transposed`."""
    matrices = list_experts(weights)
    products_RY = rows_RX.new_empty(len(rows_RX), matrices[0].shape[0 if transposed else 1])
    for rows, products, weight in zip(rows_RX.split(counts), products_RY.split(counts), matrices, strict=True):
        if len(rows) > 0:
            matrix = read_weight(weight, rows.dtype)
            torch.mm(rows, matrix.t() if transposed else matrix, out=products)
    return products_RY


def _multiply_outer(rows_RY: torch.Tensor, rows_RX: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[E, Y, X], zeros for an expert without rows."""
    outer_EYX = rows_RX.new_empty(len(counts), rows_RY.shape[1], rows_RX.shape[1])
    for left, right, outer in zip(rows_RY.split(counts), rows_RX.split(counts), outer_EYX, strict=True):
        torch.mm(left.t(), right, out=outer)
    return outer_EYX


def _sum_of_tokens(rows_RH: torch.Tensor, order_R: torch.Tensor, tokens_TH: torch.Tensor) -> torch.Tensor:
    """[T, H]: each token's rows added up, in the same order each time."""
    places_R = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return rows_RH.index_select(0, places_R).view(len(tokens_TH), -1, rows_RH.shape[1]).sum(1)
