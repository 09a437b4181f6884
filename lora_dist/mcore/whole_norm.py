"""Queries and keys normalised over all heads together, as MiniMax-M2 and OLMo have them, and turned, in one step.

A TP rank has some heads alone, so the sums of squares are summed over the ranks: one collective of two numbers a token
forward, for queries and keys together, and one backward. Backward starts from what comes out, which attention keeps
anyway, so that nothing else is kept but one factor a token for queries and one for keys.

Shapes: S sequence, B rows, A heads of this rank (of queries, or of keys), D features of a head, F frequencies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.fusion import Chain
from lora_dist.mcore.layers import allocate
from lora_dist.mcore.norm import MIN_NORMALS, upcast
from lora_dist.mcore.rotary import Angles, LayerAngles, RotarySelfAttention, turn

_MIN_RATIO_LIMIT, _MAX_ERROR = 64.0, 1e-5
"""Of two weights that are turned together the larger one over the smaller is at most the larger of the first and the
second over the dtype's epsilon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Whole:
    """What the shards of a layer's queries and keys are parts of."""

    sizes: tuple[int, int]
    """Features of all queries, and of all keys."""
    num_copies: int
    """Ranks that have each key head. Each computes one summand of its gradient."""
    eps: float
    group: dist.ProcessGroup | None
    """Over which the heads are split; None where one rank has all."""

    def sum_over_ranks(self, of_queries_SB: torch.Tensor, of_keys_SB: torch.Tensor) -> list[torch.Tensor]:
        sums_2SB = torch.stack([of_queries_SB, of_keys_SB])
        if self.group is not None:
            dist.all_reduce(sums_2SB, group=self.group)
        return list(sums_2SB)


class WholeNorm(nn.Module):
    """RMS norms (arXiv:1910.07467) of queries and of keys, their weights split over TP as the heads are."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        model: ModelConfig = config.model
        tp_size, self.head_dim, self.rotary_size = config.tensor_model_parallel_size, model.head_dim, model.rotary_size
        num_key_heads = max(1, model.num_query_groups // tp_size)
        self.q_weight = nn.Parameter(allocate(model.query_size // tp_size, config=config))
        self.k_weight = nn.Parameter(allocate(num_key_heads * model.head_dim, config=config))
        self._whole = _Whole(
            sizes=(model.query_size, model.kv_size),
            num_copies=max(1, tp_size // model.num_query_groups),
            eps=model.layernorm_epsilon,
            group=ps.get_tensor_model_parallel_group() if tp_size > 1 else None,
        )
        self._invertible: bool | None = None

    def forward(
        self, query_SBAD: torch.Tensor, key_SBAD: torch.Tensor, angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both normalised and turned, in their dtype; keys have fewer heads. Collective over TP."""
        weights = [weight.unflatten(0, (-1, self.head_dim)) for weight in (self.q_weight, self.k_weight)]
        trains = any(weight.requires_grad for weight in weights)
        from_output = not trains and self._is_invertible(weights)
        query_SBAD, key_SBAD = _NormAndTurn.apply(  # type: ignore[no-untyped-call]
            query_SBAD, key_SBAD, *weights, *angles, self._whole, from_output
        )
        return query_SBAD, key_SBAD

    def _is_invertible(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the normalised input can be had back from the output; asked once, since the weights are frozen."""
        if self._invertible is None:
            num_bad = torch.stack([_count_small(weight_AD, self.rotary_size // 2) for weight_AD in weights]).sum()
            self._invertible = num_bad.item() == 0
        return self._invertible


def _count_small(weight_AD: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """Weights that have lost the input, or that are much smaller than the one they are turned with.

    The larger one's rounding is in both of a pair then. It meets the gradient in the part alone that all features
    share, a mean over all of them, where it hardly counts: hence a limit that is wide for the dtype.
    """
    smallest = MIN_NORMALS * torch.finfo(weight_AD.dtype).smallest_normal
    limit = max(_MIN_RATIO_LIMIT, _MAX_ERROR / torch.finfo(weight_AD.dtype).eps)
    sizes_AD = upcast(weight_AD.detach()).abs()
    first_AF, second_AF = sizes_AD[:, : 2 * num_frequencies].chunk(2, dim=1)
    is_bad_AF = (first_AF > limit * second_AF) | (second_AF > limit * first_AF)
    return (sizes_AD < smallest).sum() + is_bad_AF.sum()


class _NormAndTurn(torch.autograd.Function):
    """y = R (x rstd weight) of queries and of keys; keeps x or, where `from_output`, y, and rstd [S, B]."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        q_weight_AD: torch.Tensor,
        k_weight_AD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        whole: _Whole,
        from_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, weights = (query_SBAD, key_SBAD), (q_weight_AD, k_weight_AD)
        squares = whole.sum_over_ranks(_sum_squares(query_SBAD), _sum_squares(key_SBAD) / whole.num_copies)
        rstds = [(sum_SB / size).add_(whole.eps).rsqrt_() for sum_SB, size in zip(squares, whole.sizes, strict=True)]
        query_SBAD, key_SBAD = (turn(_scale(*one), cos, sin) for one in zip(inputs, rstds, weights, strict=True))
        ctx.save_for_backward(*((query_SBAD, key_SBAD) if from_output else inputs), *rstds, *weights, cos, sin)
        ctx.whole, ctx.from_output = whole, from_output
        return query_SBAD, key_SBAD

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dquery_SBAD: torch.Tensor, dkey_SBAD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *tensors, cos, sin = ctx.saved_tensors
        kept, rstds, weights = tensors[:2], tensors[2:4], tensors[4:]
        dscaled = [turn(dy_SBAD, cos, -sin) for dy_SBAD in (dquery_SBAD, dkey_SBAD)]
        if ctx.from_output:
            normalised = [_turn_back(*one, cos, sin) for one in zip(kept, weights, strict=True)]
        else:
            normalised = [_normalise(*one) for one in zip(kept, rstds, strict=True)]
        sides = list(zip(dscaled, normalised, weights, strict=True))
        dweights = [
            _compute_weight_grad(*side) if needed else None
            for side, needed in zip(sides, ctx.needs_input_grad[2:4], strict=True)
        ]
        if not any(ctx.needs_input_grad[:2]):
            return None, None, *dweights, None, None, None, None
        whole: _Whole = ctx.whole
        shares = whole.sum_over_ranks(*(_sum_products(*side) for side in sides))
        sizes = whole.sizes[0], whole.sizes[1] * whole.num_copies
        dinputs = [
            _compute_input_grad(*side, rstd_SB, share_SB / size)
            for side, rstd_SB, share_SB, size in zip(sides, rstds, shares, sizes, strict=True)
        ]
        return *dinputs, *dweights, None, None, None, None


@Chain
def _sum_squares(x_SBAD: torch.Tensor) -> torch.Tensor:
    """[S, B], in fp32 at least, as all that follows within."""
    return upcast(x_SBAD).square().sum((-2, -1))


@Chain
def _normalise(x_SBAD: torch.Tensor, rstd_SB: torch.Tensor) -> torch.Tensor:
    return upcast(x_SBAD) * rstd_SB[..., None, None]


@Chain
def _scale(x_SBAD: torch.Tensor, rstd_SB: torch.Tensor, weight_AD: torch.Tensor) -> torch.Tensor:
    """In the dtype of `x_SBAD`."""
    return (upcast(x_SBAD) * rstd_SB[..., None, None]).mul_(weight_AD).to(x_SBAD.dtype)


def _turn_back(y_SBAD: torch.Tensor, weight_AD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The normalised input; cosines and sines as rounded are no rotation, and may be longer (YaRN's are)."""
    cos, sin = upcast(cos), upcast(sin)
    squares = cos.square() + sin.square()
    return turn(upcast(y_SBAD), cos / squares, -sin / squares).div_(weight_AD)


@Chain
def _compute_weight_grad(
    dscaled_SBAD: torch.Tensor, normalised_SBAD: torch.Tensor, weight_AD: torch.Tensor
) -> torch.Tensor:
    return (normalised_SBAD * dscaled_SBAD).sum((0, 1)).to(weight_AD.dtype)


@Chain
def _sum_products(dscaled_SBAD: torch.Tensor, normalised_SBAD: torch.Tensor, weight_AD: torch.Tensor) -> torch.Tensor:
    """[S, B]: this rank's summand of what all of a token's features have of the gradient together."""
    return (normalised_SBAD * weight_AD).mul_(dscaled_SBAD).sum((-2, -1))


@Chain
def _compute_input_grad(
    dscaled_SBAD: torch.Tensor,
    normalised_SBAD: torch.Tensor,
    weight_AD: torch.Tensor,
    rstd_SB: torch.Tensor,
    share_SB: torch.Tensor,
) -> torch.Tensor:
    shared_SBAD = normalised_SBAD * share_SB[..., None, None]
    dx_SBAD = (upcast(dscaled_SBAD) * weight_AD).sub_(shared_SBAD).mul_(rstd_SB[..., None, None])
    return dx_SBAD.to(dscaled_SBAD.dtype)


class WholeNormedSelfAttention(RotarySelfAttention):
    """Self-attention with a `WholeNorm`, in which its queries and keys are turned too."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.whole_norm = WholeNorm(config)

    def _turn(
        self, query_SBAD: torch.Tensor, key_SBAD: torch.Tensor, angles: LayerAngles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert angles.of_queries is angles.of_keys, "no family has norms over all heads and queries that grow"
        turned: tuple[torch.Tensor, torch.Tensor] = self.whole_norm(query_SBAD, key_SBAD, angles.of_keys)
        return turned
