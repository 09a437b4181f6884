"""Attention with sinks, a learned score for each head that joins the softmax's denominator and nothing else, by the
fused kernels, which have none.

A kernel gives the output o and the logarithm of the sum of the scores' exponentials, L. With the sink s
(arXiv:2508.10925) that becomes L' = log(exp(L) + exp(s)), and the output y = o exp(L - L'). The kernels' backward takes
from forward nothing but o and L: handed y and L' it gives the gradients with the sink.

Shapes: B rows, A heads of this rank, S positions of queries, K of keys, D features of a head.
"""

from typing import Any

import torch

from lora_dist.fusion import Chain
from lora_dist.mcore.kernels import AttentionKernel, Bias


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks_A: torch.Tensor,
    bias: Bias,
    scale: float | None,
    kernel: AttentionKernel,
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
        bias: Bias,
        scale: float | None,
        kernel: AttentionKernel,
    ) -> torch.Tensor:
        out, lse, *rest = kernel.attend(query, key, value, bias, bias is None, scale)
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
        inputs, results = (query, key, value), (output, joined_lse)
        grads = ctx.kernel.differentiate(doutput, inputs, bias, bias is None, results, rest, ctx.scale)
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
