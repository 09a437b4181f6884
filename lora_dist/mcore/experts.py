"""The MLP of a layer as several experts, of which a router picks some for each token: frozen or trained, TP-sharded.

Every TP rank holds a slice of every expert, so that the ranks' work is the same whatever the router picks, and what
they communicate is what a dense MLP's would be. Shapes: S sequence, B rows, H hidden, E experts, K experts of a token,
T = S B tokens, R = T K rows that experts see, ordered by expert, F features of an expert on this rank.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.base_format import LinearShape
from lora_dist.lora.function import BaseWeight, read_weight
from lora_dist.mcore.gates import compute_gated, compute_weighted_grad
from lora_dist.quant.weight import QuantizedWeight


class ExpertMlp(nn.Module):
    """In place of Megatron's MLP, with its constructor: `config.model` says what there is to build."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, model = config, config.model
        # DeepSpeed's ZeRO 3 gathers what is below this module with it: the experts' own forward is never called.
        self._z3_leaf = True
        self.router = _Router(config)
        self.experts = nn.ModuleList(_Expert(config) for _ in range(model.num_experts))

    def forward(self, hidden_SBH: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """The output, under sequence parallelism this rank's share as the input is, and no bias."""
        hidden_SBH = self._enter(hidden_SBH)
        tokens_TH = hidden_SBH.flatten(0, 1)
        weights_TK, choices_TK = self.router(tokens_TH)
        experts = [expert.weights for expert in cast(Sequence[_Expert], self.experts)]
        output_TH = mix_experts(tokens_TH, weights_TK, choices_TK, experts)
        return self._leave(output_TH.view_as(hidden_SBH)), None

    def _enter(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The whole sequence; backward sums what the ranks' slices of the experts make of its gradient."""
        group = ps.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_SBH, group=group)
        return copy_to_tensor_model_parallel_region(hidden_SBH, group=group)

    def _leave(self, partial_SBH: torch.Tensor) -> torch.Tensor:
        group = ps.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial_SBH, group=group)
        return reduce_from_tensor_model_parallel_region(partial_SBH, group=group)


class _Router(nn.Module):
    """Whole on every TP rank, which all pick the same; the gradient of its weight is one rank's summand."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model = config.model
        self.weight = nn.Parameter(_allocate(self.model.num_experts, config.hidden_size, config))

    def forward(self, tokens_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each picked expert's output counts, and which ones they are: both [T, K]."""
        logits_TE = F.linear(tokens_TH, self.weight)
        shares_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        weights_TK, choices_TK = shares_TE.topk(self.model.experts_per_token, dim=-1)
        if self.model.normalize_expert_weights:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(tokens_TH.dtype), choices_TK


class _Expert(nn.Module):
    """The weights of one: gate and up in one linear, as in a dense MLP, and down."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.ffn_hidden_size // config.tensor_model_parallel_size
        self.linear_fc1 = ExpertWeight(config, 2 * size, config.hidden_size, column_parallel=True)
        self.linear_fc2 = ExpertWeight(config, config.hidden_size, size, column_parallel=False)

    @property
    def weights(self) -> tuple[BaseWeight, BaseWeight]:
        return self.linear_fc1.weight, self.linear_fc2.weight


class ExpertWeight(nn.Module):
    """This rank's slice of one linear of one expert."""

    def __init__(
        self, config: TransformerConfig, out_features: int, in_features: int, *, column_parallel: bool
    ) -> None:
        super().__init__()
        self.column_parallel = column_parallel
        self.weight: BaseWeight
        if config.model.base_format == "native":
            self.weight = nn.Parameter(_allocate(out_features, in_features, config))
        else:
            shape = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
            self.weight = QuantizedWeight(config.model.base_format, shape, device=torch.cuda.current_device())


def _allocate(out_features: int, in_features: int, config: TransformerConfig) -> torch.Tensor:
    """Where Megatron puts its own linears' weights."""
    return torch.empty(out_features, in_features, dtype=config.params_dtype, device=torch.cuda.current_device())


def mix_experts(
    tokens_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    choices_TK: torch.Tensor,
    experts: Sequence[tuple[BaseWeight, BaseWeight]],
) -> torch.Tensor:
    """[T, H]: of each token the sum of its experts' outputs, by weight; this rank's summand of it.

    `experts` are [2F, H] and [H, F] each: W2 (silu(gate) * up), [gate | up] = W1 x.
    """
    trained = [weight for pair in experts for weight in pair if isinstance(weight, torch.Tensor)]
    if not any(weight.requires_grad for weight in trained):
        trained = []
    mixed_TH: torch.Tensor = _MixedExperts.apply(  # type: ignore[no-untyped-call]
        tokens_TH, weights_TK, choices_TK, experts, *trained
    )
    return mixed_TH


class _MixedExperts(torch.autograd.Function):
    """Keeps [gate | up] of every row, and the tokens where experts train; no output of an expert.

    A row's weight multiplies what enters the second linear. So its gradient is a product of that with what the linear
    hands back, and the expert's output is not needed for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        choices_TK: torch.Tensor,
        experts: Sequence[tuple[BaseWeight, BaseWeight]],
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        order_R = choices_TK.flatten().argsort(stable=True)
        ctx.experts, ctx.counts = experts, _count_rows(choices_TK, len(experts))
        weights_R = weights_TK.flatten()[order_R]
        rows_RH = tokens_TH.index_select(0, order_R // weights_TK.shape[1])
        gate_up_R2F = _multiply(rows_RH, [first for first, _ in experts], ctx.counts, transposed=True)
        del rows_RH
        inner_RF = compute_gated(gate_up_R2F, False).mul_(weights_R[:, None])
        ctx.save_for_backward(tokens_TH if trained else None, gate_up_R2F, weights_R, order_R)
        products_RH = _multiply(inner_RF, [second for _, second in experts], ctx.counts, transposed=True)
        return _sum_of_tokens(products_RH, order_R, tokens_TH)

    @staticmethod
    def backward(ctx: Any, dmixed_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        tokens_TH, gate_up_R2F, weights_R, order_R = ctx.saved_tensors
        num_choices = len(order_R) // len(dmixed_TH)
        drows_RH = dmixed_TH.index_select(0, order_R // num_choices)
        dinner_RF = _multiply(drows_RH, [second for _, second in ctx.experts], ctx.counts)
        dgate_up_R2F, dweights_R = compute_weighted_grad(dinner_RF, gate_up_R2F, weights_R)
        dtrained: list[torch.Tensor] = []
        if tokens_TH is not None:
            rows_RH = tokens_TH.index_select(0, order_R // num_choices)
            dfirst = _multiply_outer(dgate_up_R2F, rows_RH, ctx.counts)
            inner_RF = compute_gated(gate_up_R2F, False).mul_(weights_R[:, None])
            dsecond = _multiply_outer(drows_RH, inner_RF, ctx.counts)
            dtrained = [gradient for pair in zip(dfirst, dsecond, strict=True) for gradient in pair]
        del drows_RH, dinner_RF
        dtokens_RH = _multiply(dgate_up_R2F, [first for first, _ in ctx.experts], ctx.counts)
        dweights_TK = torch.empty_like(dweights_R).index_copy_(0, order_R, dweights_R).view(-1, num_choices)
        return _sum_of_tokens(dtokens_RH, order_R, dmixed_TH), dweights_TK, None, None, *dtrained


def _count_rows(choices_TK: torch.Tensor, num_experts: int) -> list[int]:
    """Of each expert. Where a plan's tensors hold no choices each has as many as any other, or one more."""
    if choices_TK.is_meta:
        share, rest = divmod(choices_TK.numel(), num_experts)
        return [share + (expert < rest) for expert in range(num_experts)]
    counts: list[int] = choices_TK.flatten().bincount(minlength=num_experts).tolist()
    return counts


def _multiply(
    rows_RX: torch.Tensor, weights: Sequence[BaseWeight], counts: list[int], *, transposed: bool = False
) -> torch.Tensor:
    """[R, Y]: each expert's rows times its weight [X, Y], or [Y, X] where `transposed`."""
    products_RY = rows_RX.new_empty(len(rows_RX), weights[0].shape[0 if transposed else 1])
    for rows, products, weight in zip(rows_RX.split(counts), products_RY.split(counts), weights, strict=True):
        if len(rows) > 0:
            matrix = read_weight(weight, rows.dtype)
            torch.mm(rows, matrix.t() if transposed else matrix, out=products)
    return products_RY


def _multiply_outer(rows_RY: torch.Tensor, rows_RX: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """[Y, X] of each expert, of one without rows zeros."""
    return [left.t() @ right for left, right in zip(rows_RY.split(counts), rows_RX.split(counts), strict=True)]


def _sum_of_tokens(rows_RH: torch.Tensor, order_R: torch.Tensor, tokens_TH: torch.Tensor) -> torch.Tensor:
    """[T, H]: each token's rows added up, in the same order each time."""
    places_R = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return rows_RH.index_select(0, places_R).view(len(tokens_TH), -1, rows_RH.shape[1]).sum(1)
