"""Attention by the fused kernels called directly, for what torch's own function does not do: with sinks, and tile by
tile where a layer sees a sliding window.

Kept for backward are queries, keys and values as they come, once each, the output and the scores' logarithms: heads
written out for a kernel that shares none, features that fill up heads, and tiles are made again.

Shapes: B rows, A heads of this rank, S positions of queries, K of keys, D features of a query and a key, V of a value.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.mcore.kernels import AttentionKernel, Bias, choose_kernel, fill_features, write_out_heads
from lora_dist.mcore.sinks import compute_sink_grad, join_sinks
from lora_dist.mcore.window import Tiles, Tiling

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend_directly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks_A: torch.Tensor | None,
    mask: Bias | Tiles,
    scale: float | None,
) -> torch.Tensor:
    """[B, A, S, V] of [B, heads, S or K, D or V]: causal where there is no mask; `scale` None means D^-0.5."""
    tiling = mask.describe(query) if isinstance(mask, Tiles) else None
    bias = mask.bias if isinstance(mask, Tiles) else mask
    kernel = choose_kernel(query, bias)
    num_copies = 1 if kernel.takes_shared_heads else query.shape[1] // key.shape[1]
    call = _Call(kernel, tiling, num_copies, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    output: torch.Tensor = _DirectAttention.apply(query, key, value, sinks_A, bias, call)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True, slots=True)
class _Call:
    """Of a kernel: how, and what it is handed."""

    kernel: AttentionKernel
    tiling: Tiling | None
    num_copies: int
    """Of each head of keys and values."""
    scale: float

    def lay_out(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> _Inputs:
        if self.num_copies > 1:
            key, value = write_out_heads(key, query), write_out_heads(value, query)
        num_features = query.shape[-1]
        key, value = fill_features(key, num_features), fill_features(value, num_features)
        if self.tiling is not None:
            key, value = self.tiling.cut_keys(key), self.tiling.cut_keys(value)
        return self.lay_out_queries(query, num_features), key, value

    def lay_out_queries(self, x: torch.Tensor, num_features: int) -> torch.Tensor:
        """Queries, or what has their positions."""
        x = fill_features(x, num_features)
        return x if self.tiling is None else self.tiling.cut_queries(x)

    def join_queries(self, x: torch.Tensor, num_features: int) -> torch.Tensor:
        x = x if self.tiling is None else self.tiling.join_queries(x)
        return x[..., :num_features]

    def sum_keys(self, dx: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The gradient of keys or values, rounded once for all tiles and copies of a head."""
        if self.num_copies > 1:
            dx = dx.unflatten(1, (-1, self.num_copies)).sum(2, dtype=torch.promote_types(dx.dtype, torch.float32))
        dx = dx if self.tiling is None else self.tiling.sum_keys(dx)
        return dx[..., : like.shape[-1]].to(like.dtype)


class _DirectAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks_A: torch.Tensor | None,
        bias: Bias,
        call: _Call,
    ) -> torch.Tensor:
        out, lse, *rest = call.kernel.attend(*call.lay_out(query, key, value), bias, bias is None, call.scale)
        if sinks_A is not None:
            lse = join_sinks(out, lse, _repeat_sinks(sinks_A, lse))
        output = call.join_queries(out, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, lse, sinks_A, bias, *rest)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse, sinks_A, bias, *rest = ctx.saved_tensors
        call: _Call = ctx.call
        doutput, output = (call.lay_out_queries(x, query.shape[-1]) for x in (doutput, output))
        dsinks_A = _sum_sink_grads(doutput, output, lse, sinks_A) if ctx.needs_input_grad[3] else None
        inputs, results = call.lay_out(query, key, value), (output, lse)
        dquery, dkey, dvalue = call.kernel.differentiate(doutput, inputs, bias, bias is None, results, rest, call.scale)
        dquery = call.join_queries(dquery, query.shape[-1])
        dkey = call.sum_keys(dkey, key)
        dvalue = call.sum_keys(dvalue, value)
        return dquery, dkey, dvalue, dsinks_A, None, None


def _sum_sink_grads(
    doutput: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, sinks_A: torch.Tensor
) -> torch.Tensor:
    dsinks = compute_sink_grad(doutput, output, lse, _repeat_sinks(sinks_A, lse).to(lse.dtype))
    return dsinks.view(-1, len(sinks_A)).sum(0).to(sinks_A.dtype)


def _repeat_sinks(sinks_A: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """For the rows that lie beside each other's heads."""
    return sinks_A.expand(lse.shape[1] // len(sinks_A), -1).flatten()
