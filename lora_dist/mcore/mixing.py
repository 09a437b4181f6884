"""The product of a layer's experts: each token's rows through the experts its router picked, weighted and added up.

Shapes: H hidden, E experts, C experts of a token, T tokens, R = T C rows that experts see, ordered by expert, F
features of an expert on this rank, K the summed ranks of the adapters on one linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.fusion import Chain
from lora_dist.lora.experts import Factors, add_updates, compute_factor_grads
from lora_dist.lora.row_groups import ExpertWeights, RowGroups
from lora_dist.mcore.gates import GateBounds, compute_row_grads, gate_rows


def mix_experts(
    tokens_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    choices_TC: torch.Tensor,
    first: ExpertWeights,
    second: ExpertWeights,
    first_factors: Factors | None = None,
    second_factors: Factors | None = None,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    bounds: GateBounds | None = None,
    grouped: bool = False,
) -> torch.Tensor:
    """[T, H]: of each token the sum of its experts' outputs, by weight; this rank's summand of it.

    `first` is [2F, H] of each expert and `second` [H, F]: W2 gate_rows([gate | up]) + b2, [gate | up] = W1 x + b1. The
    factors are the adapters' of W1 and of W2, the biases [E, 2F] and [E, H], of these this rank's summand. `grouped`:
    all experts' products in one call, where `can_group` says so.
    """
    factors = [*(first_factors or (None, None)), *(second_factors or (None, None))]
    mixed_TH: torch.Tensor = _MixedExperts.apply(  # type: ignore[no-untyped-call]
        tokens_TH, weights_TC, choices_TC, grouped, bounds, first, second, *(biases or (None, None)), *factors
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
        grouped: bool,
        bounds: GateBounds | None,
        first: ExpertWeights,
        second: ExpertWeights,
        first_bias: torch.Tensor | None,
        second_bias: torch.Tensor | None,
        first_a: torch.Tensor | None,
        first_b: torch.Tensor | None,
        second_a: torch.Tensor | None,
        second_b: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.first, ctx.second, ctx.bounds = first, second, bounds
        ctx.are_trained = isinstance(first, torch.Tensor) and first.requires_grad
        sorted_R, order_R = choices_TC.flatten().sort(stable=True)
        groups = ctx.groups = RowGroups.find(sorted_R, first, second, grouped=grouped)
        weights_R = weights_TC.flatten()[order_R]
        rows_RH = tokens_TH.index_select(0, order_R // weights_TC.shape[1])
        gate_up_R2F, first_z = _apply(rows_RH, first, (first_a, first_b), groups)
        del rows_RH
        if first_bias is not None:
            _add_biases(gate_up_R2F, first_bias, sorted_R)
        inner_RF = gate_rows(gate_up_R2F, bounds).mul_(weights_R[:, None])
        products_RH, second_z = _apply(inner_RF, second, (second_a, second_b), groups)
        if second_bias is not None:
            _add_weighted_biases(products_RH, second_bias, sorted_R, weights_R)
        kept_TH = tokens_TH if ctx.are_trained or first_a is not None else None
        adapters = first_a, first_b, first_z, second_a, second_b, second_z
        biases = (None, None) if second_bias is None else (second_bias, sorted_R)
        ctx.save_for_backward(kept_TH, gate_up_R2F, weights_R, order_R, *biases, *adapters)
        return _sum_of_tokens(products_RH, order_R, tokens_TH)

    @staticmethod
    def backward(ctx: Any, dmixed_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        tokens_TH, gate_up_R2F, weights_R, order_R, second_bias, experts_R, *adapters = ctx.saved_tensors
        num_choices, (needs_tokens, needs_weights) = len(order_R) // len(dmixed_TH), ctx.needs_input_grad[:2]
        drows_RH = dmixed_TH.index_select(0, order_R // num_choices)
        inner_RF = None
        if ctx.are_trained or adapters[3] is not None:
            inner_RF = gate_rows(gate_up_R2F, ctx.bounds).mul_(weights_R[:, None])
        needs_inner = needs_tokens or needs_weights or ctx.needs_input_grad[7] or tokens_TH is not None
        second = _differentiate(ctx, drows_RH, inner_RF, ctx.second, adapters[3:], needs_input=needs_inner)
        dbiases: list[torch.Tensor | None] = [None, None]
        if ctx.needs_input_grad[8]:
            dbiases[1] = ctx.groups.sum_rows(drows_RH * weights_R[:, None])
        of_biases_R = None if second_bias is None else _multiply_biases(drows_RH, second_bias, experts_R)
        del drows_RH, inner_RF
        if second.dinput is None:
            return *[None] * 8, dbiases[1], None, None, *second.factors
        dgate_up_R2F, dweights_R = compute_row_grads(second.dinput, gate_up_R2F, weights_R, ctx.bounds)
        second.dinput = None
        if of_biases_R is not None:
            dweights_R += of_biases_R
        if ctx.needs_input_grad[7]:
            dbiases[0] = ctx.groups.sum_rows(dgate_up_R2F)
        rows_RH = None if tokens_TH is None else tokens_TH.index_select(0, order_R // num_choices)
        first = _differentiate(ctx, dgate_up_R2F, rows_RH, ctx.first, adapters[:3], needs_input=needs_tokens)
        del rows_RH
        dtokens_TH = None if first.dinput is None else _sum_of_tokens(first.dinput, order_R, dmixed_TH)
        dweights_TC = torch.empty_like(dweights_R).index_copy_(0, order_R, dweights_R).view(-1, num_choices)
        weights = first.weights, second.weights
        return dtokens_TH, dweights_TC, None, None, None, *weights, *dbiases, *first.factors, *second.factors


@Chain
def _add_biases(products_RY: torch.Tensor, bias_EY: torch.Tensor, experts_R: torch.Tensor) -> None:
    """Each row's expert's, in place."""
    products_RY.add_(bias_EY.index_select(0, experts_R))


@Chain
def _add_weighted_biases(
    products_RY: torch.Tensor, bias_EY: torch.Tensor, experts_R: torch.Tensor, weights_R: torch.Tensor
) -> None:
    products_RY.addcmul_(bias_EY.index_select(0, experts_R), weights_R[:, None])


@Chain
def _multiply_biases(drows_RY: torch.Tensor, bias_EY: torch.Tensor, experts_R: torch.Tensor) -> torch.Tensor:
    """[R]: what the biases add to the gradients of the weights."""
    return (drows_RY * bias_EY.index_select(0, experts_R)).sum(-1)


def _apply(
    rows_RX: torch.Tensor, weights: ExpertWeights, factors: Sequence[torch.Tensor | None], groups: RowGroups
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row through its expert's linear and the adapters on it, and what of these is needed again."""
    products_RY, (a, b) = groups.multiply(rows_RX, weights, transposed=True), factors
    return products_RY, None if a is None or b is None else add_updates(products_RY, rows_RX, (a, b), groups)


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
    (a, b, z_RK), groups = adapters, ctx.groups
    grads = _Grads(groups.multiply(dproducts_RY, weights) if needs_input else None, (None, None), None)
    if rows_RX is not None and ctx.are_trained:
        grads.weights = groups.multiply_outer(dproducts_RY, rows_RX)
    if a is not None and b is not None and z_RK is not None:
        assert rows_RX is not None
        dz_RK, *grads.factors = compute_factor_grads(dproducts_RY, rows_RX, z_RK, b, groups)
        if grads.dinput is not None:
            groups.multiply(dz_RK, a, add_to=grads.dinput)
    return grads


def _sum_of_tokens(rows_RH: torch.Tensor, order_R: torch.Tensor, tokens_TH: torch.Tensor) -> torch.Tensor:
    """[T, H]: each token's rows added up, in the same order each time."""
    places_R = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return rows_RH.index_select(0, places_R).view(len(tokens_TH), -1, rows_RH.shape[1]).sum(1)
