"""Attention with sinks, a learned score for each head that joins the softmax's denominator and nothing else, by the
fused kernels, which have none.

A kernel gives the output o and the logarithm of the sum of the scores' exponentials, L. With the sink s
(arXiv:2508.10925) that becomes L' = log(exp(L) + exp(s)), and the output y = o exp(L - L'). The kernels' backward takes
from forward nothing but o and L: handed y and L' it gives the gradients with the sink.

Shapes: B rows, A heads of this rank, S positions of queries, K of keys, D features of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import wrap_torch_function

from lora_dist.fusion import Chain

_aten = torch.ops.aten
_Tensors = tuple[torch.Tensor, ...]
_Bias = torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkKernel:
    """A fused kernel of torch's, called directly: its function for autograd keeps what has no sink in it."""

    takes_shared_heads: bool
    """Fewer heads of keys and values than of queries."""
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _Bias, float | None], tuple[Any, ...]]
    """o [B, A, S, D], L [B, A, S or more], and what else its backward wants."""
    differentiate: Callable[..., _Tensors]
    """The gradients of queries, keys and values."""


def _attend_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: _Bias, scale: float | None) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, bias is None, attn_mask=bias, scale=scale
    )


def _differentiate_cpu(
    doutput: torch.Tensor, inputs: _Tensors, bias: _Bias, results: _Tensors, _rest: Any, scale: float | None
) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        doutput, *inputs, *results, 0.0, bias is None, attn_mask=bias, scale=scale
    )


def _attend_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: _Bias, scale: float | None) -> Any:
    assert bias is None, "flash attention has no bias"
    out, lse, _, _, _, _, *seed_and_offset, _ = _aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )
    return out, lse, *seed_and_offset


def _differentiate_flash(
    doutput: torch.Tensor, inputs: _Tensors, _bias: _Bias, results: _Tensors, rest: Any, scale: float | None
) -> Any:
    lengths = inputs[0].shape[2], inputs[1].shape[2]
    return _aten._scaled_dot_product_flash_attention_backward(
        doutput, *inputs, *results, None, None, *lengths, 0.0, True, *rest, scale=scale
    )


def _attend_efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: _Bias, scale: float | None
) -> Any:
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, _write_out_bias(bias, query), True, 0.0, bias is None, scale=scale
    )


def _differentiate_efficient(
    doutput: torch.Tensor, inputs: _Tensors, bias: _Bias, results: _Tensors, rest: Any, scale: float | None
) -> Any:
    wanted = [True, True, True, False]
    bias_BASK = _write_out_bias(bias, inputs[0])
    return _aten._scaled_dot_product_efficient_attention_backward(
        doutput, *inputs, bias_BASK, *results, *rest, 0.0, wanted, bias is None, scale=scale
    )[:3]


def _write_out_bias(bias: _Bias, query: torch.Tensor) -> _Bias:
    return None if bias is None else bias.expand(*query.shape[:2], -1, -1)


ON_CPU = SinkKernel(takes_shared_heads=True, attend=_attend_cpu, differentiate=_differentiate_cpu)
FLASH = SinkKernel(takes_shared_heads=True, attend=_attend_flash, differentiate=_differentiate_flash)
EFFICIENT = SinkKernel(takes_shared_heads=False, attend=_attend_efficient, differentiate=_differentiate_efficient)


@wrap_torch_function(lambda query, _bias: (query,))
def choose_kernel(query: torch.Tensor, bias: _Bias) -> SinkKernel:
    """As torch chooses where there are no sinks. A plan, whose tensors are on no device, overrides it."""
    if query.device.type != "cuda":
        return ON_CPU
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return FLASH if has_flash and bias is None and query.dtype != torch.float32 else EFFICIENT


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks_A: torch.Tensor,
    bias: _Bias,
    scale: float | None,
    kernel: SinkKernel,
) -> torch.Tensor:
    """[B, A, S, D] of [B, heads, S or K, D]: causal, or with the bias [B, 1, S, K] added to the scores; `scale` None
    means D^-0.5. Nothing is kept for backward that the kernel does not keep itself.
    """
    output: torch.Tensor = _SinkAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, sinks_A, bias, scale, kernel
    )
    return output


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks_A: torch.Tensor,
        bias: _Bias,
        scale: float | None,
        kernel: SinkKernel,
    ) -> torch.Tensor:
        out, lse, *rest = kernel.attend(query, key, value, bias, scale)
        joined_lse = _join_sinks(out, lse, sinks_A)
        ctx.save_for_backward(query, key, value, out, joined_lse, sinks_A, bias, *rest)
        ctx.scale, ctx.kernel = scale, kernel
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, joined_lse, sinks_A, bias, *rest = ctx.saved_tensors
        if doutput.stride(-1) != 1:  # which the kernels do not take
            doutput = doutput.contiguous()
        dsinks_A = _compute_sink_grad(doutput, output, joined_lse, sinks_A) if ctx.needs_input_grad[3] else None
        grads = ctx.kernel.differentiate(doutput, (query, key, value), bias, (output, joined_lse), rest, ctx.scale)
        return *grads, dsinks_A, None, None, None


@Chain
def _join_sinks(out_BASD: torch.Tensor, lse: torch.Tensor, sinks_A: torch.Tensor) -> torch.Tensor:
    """L' out of L; o is overwritten with y. The memory-efficient kernel fills L up with +inf, which stays so."""
    sinks_A1 = sinks_A.to(lse.dtype)[:, None]
    share = (lse - sinks_A1)[..., : out_BASD.shape[2]].sigmoid()  # exp(L - L')
    out_BASD.mul_(share[..., None])
    return torch.logaddexp(lse, sinks_A1)


@Chain
def _compute_sink_grad(
    doutput_BASD: torch.Tensor, output_BASD: torch.Tensor, joined_lse: torch.Tensor, sinks_A: torch.Tensor
) -> torch.Tensor:
    """Of each row exp(s - L') of the probability is the sink's, by which the output is smaller than without it."""
    share = (sinks_A.to(joined_lse.dtype)[:, None] - joined_lse[..., : output_BASD.shape[2]]).exp()
    product = (doutput_BASD * output_BASD).sum(-1, dtype=joined_lse.dtype)
    return -(share * product).sum((0, 2)).to(sinks_A.dtype)
