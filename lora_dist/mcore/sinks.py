"""Attention with sinks, a learned score for each head that joins the softmax's denominator and nothing else, by the
fused kernels, which have none.

A kernel gives the output o and the logarithm of the sum of the scores' exponentials, L. With the sink s
(arXiv:2508.10925) that becomes L' = log(exp(L) + exp(s)), and the output y = o exp(L - L'). The kernels' backward takes
from forward nothing but o and L: handed y and L' it gives the gradients with the sink.

Shapes: B rows, A heads of this rank, S positions, D features of a head.
"""

import torch

from lora_dist.fusion import Chain


@Chain
def join_sinks(out_BASD: torch.Tensor, lse: torch.Tensor, sinks_A: torch.Tensor) -> torch.Tensor:
    """L' out of L; o is overwritten with y. The memory-efficient kernel fills L up with +inf, which stays so."""
    sinks_A1 = sinks_A.to(lse.dtype)[:, None]
    share = (lse - sinks_A1)[..., : out_BASD.shape[2]].sigmoid()  # exp(L - L')
    out_BASD.mul_(share[..., None])
    return torch.logaddexp(lse, sinks_A1)


@Chain
def compute_sink_grad(
    doutput_BASD: torch.Tensor, output_BASD: torch.Tensor, joined_lse: torch.Tensor, sinks_A: torch.Tensor
) -> torch.Tensor:
    """Of each row exp(s - L') of the probability is the sink's, by which the output is smaller than without it."""
    share = (sinks_A.to(joined_lse.dtype)[:, None] - joined_lse[..., : output_BASD.shape[2]]).exp()
    product = (doutput_BASD * output_BASD).sum(-1, dtype=joined_lse.dtype)
    return -(share * product).sum((0, 2)).to(sinks_A.dtype)
