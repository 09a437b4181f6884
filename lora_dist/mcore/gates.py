"""The gated activation of an MLP, which keeps its input alone for backward.

Shapes: N leading dimensions, F features of the MLP on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.fusion import Chain


class SwiGlu(nn.Module):
    """silu(gate) * up of [gate | up] (arXiv:2002.05202); with Megatron's constructor."""

    is_gelu = False

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_up_N2F: torch.Tensor) -> torch.Tensor:
        output_NF: torch.Tensor = _Gated.apply(gate_up_N2F, self.is_gelu)  # type: ignore[no-untyped-call]
        return output_NF


class GeGlu(SwiGlu):
    """gelu(gate) * up, by the approximation with tanh."""

    is_gelu = True


class _Gated(torch.autograd.Function):
    """Autograd's own would keep the activated gate too, F more values a token."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: torch.Tensor, is_gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_up_N2F)
        ctx.is_gelu = is_gelu
        return compute_gated(gate_up_N2F, is_gelu)

    @staticmethod
    def backward(ctx: Any, doutput_NF: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gate_up_N2F,) = ctx.saved_tensors
        return _compute_grad(doutput_NF, gate_up_N2F, ctx.is_gelu), None


def _activate(gate_NF: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    return F.gelu(gate_NF, approximate="tanh") if is_gelu else F.silu(gate_NF)


@Chain
def compute_gated(gate_up_N2F: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return _activate(gate_NF, is_gelu).mul_(up_NF)


def _write_grad(doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    dgate_up_N2F = torch.empty_like(gate_up_N2F)
    dgate_NF, dup_NF = dgate_up_N2F.chunk(2, dim=-1)
    torch.mul(doutput_NF, _activate(gate_NF, is_gelu), out=dup_NF)
    if is_gelu:
        torch.ops.aten.gelu_backward.grad_input(doutput_NF * up_NF, gate_NF, approximate="tanh", grad_input=dgate_NF)
    else:
        torch.ops.aten.silu_backward.grad_input(doutput_NF * up_NF, gate_NF, grad_input=dgate_NF)
    return dgate_up_N2F


def _join_grad(doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    dactivated_NF = doutput_NF * up_NF
    if is_gelu:
        dgate_NF = torch.ops.aten.gelu_backward(dactivated_NF, gate_NF, approximate="tanh")
    else:
        dgate_NF = torch.ops.aten.silu_backward(dactivated_NF, gate_NF)
    return torch.cat([dgate_NF, doutput_NF * _activate(gate_NF, is_gelu)], dim=-1)


_compute_grad = Chain(_write_grad, compiled=_join_grad)


def _write_weighted_grad(
    doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    dgate_up_N2F = torch.empty_like(gate_up_N2F)
    dgate_NF, dup_NF = dgate_up_N2F.chunk(2, dim=-1)
    torch.mul(doutput_NF, F.silu(gate_NF), out=dup_NF)
    dweights_N = (dup_NF * up_NF).sum(-1)
    dup_NF.mul_(weights_N[:, None])
    dactivated_NF = (doutput_NF * up_NF).mul_(weights_N[:, None])
    torch.ops.aten.silu_backward.grad_input(dactivated_NF, gate_NF, grad_input=dgate_NF)
    return dgate_up_N2F, dweights_N


def _join_weighted_grad(
    doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    dup_NF = doutput_NF * F.silu(gate_NF)
    dgate_NF = torch.ops.aten.silu_backward(doutput_NF * up_NF * weights_N[:, None], gate_NF)
    return torch.cat([dgate_NF, dup_NF * weights_N[:, None]], dim=-1), (dup_NF * up_NF).sum(-1)


compute_weighted_grad = Chain(_write_weighted_grad, compiled=_join_weighted_grad)
"""Of weights_N silu(gate) * up: the gradients of [gate | up] and of the weights."""


def gate_weighted(gate_up_N2F: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """weights_N silu(gate) * up, of which nothing else is kept for backward."""
    output_NF: torch.Tensor = _Weighted.apply(gate_up_N2F, weights_N)  # type: ignore[no-untyped-call]
    return output_NF


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up_N2F, weights_N)
        return compute_gated(gate_up_N2F, False).mul_(weights_N[:, None])

    @staticmethod
    def backward(ctx: Any, doutput_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return compute_weighted_grad(doutput_NF, *ctx.saved_tensors)


def multiply_by_sigmoid(x_NF: torch.Tensor, gate_NF: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate), of which nothing else is kept for backward."""
    output_NF: torch.Tensor = _MultipliedBySigmoid.apply(x_NF, gate_NF)  # type: ignore[no-untyped-call]
    return output_NF


class _MultipliedBySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NF: torch.Tensor, gate_NF: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_NF, gate_NF)
        return _multiply_by_sigmoid(x_NF, gate_NF)

    @staticmethod
    def backward(ctx: Any, doutput_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return _compute_sigmoid_grads(doutput_NF, *ctx.saved_tensors)


@Chain
def _multiply_by_sigmoid(x_NF: torch.Tensor, gate_NF: torch.Tensor) -> torch.Tensor:
    return gate_NF.sigmoid().mul_(x_NF)


@Chain
def _compute_sigmoid_grads(
    doutput_NF: torch.Tensor, x_NF: torch.Tensor, gate_NF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and of the gate."""
    sigmoid_NF = gate_NF.sigmoid()
    dx_NF = doutput_NF * sigmoid_NF
    return dx_NF, sigmoid_NF.neg_().add_(1).mul_(dx_NF).mul_(x_NF)


@dataclass(frozen=True, slots=True)
class GateBounds:
    """Of (up + 1) gate sigmoid(alpha gate), where gate is at most `limit`, and up that far from zero (gpt-oss,
    arXiv:2508.10925).
    """

    alpha: float
    limit: float


def gate_rows(gate_up_N2F: torch.Tensor, bounds: GateBounds | None) -> torch.Tensor:
    """Silu(gate) * up, or as the bounds say."""
    if bounds is None:
        return compute_gated(gate_up_N2F, False)
    return _compute_bounded(gate_up_N2F, bounds.alpha, bounds.limit)


def compute_row_grads(
    doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor, bounds: GateBounds | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of weights_N times `gate_rows`: the gradients of [gate | up] and of the weights."""
    if bounds is None:
        return compute_weighted_grad(doutput_NF, gate_up_N2F, weights_N)
    return _compute_bounded_grad(doutput_NF, gate_up_N2F, weights_N, bounds.alpha, bounds.limit)


@Chain
def _compute_bounded(gate_up_N2F: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    gate_NF = gate_NF.clamp(max=limit)
    return (gate_NF * alpha).sigmoid_().mul_(gate_NF).mul_(up_NF.clamp(-limit, limit).add_(1))


def _write_bounded_grad(
    doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    dgate_up_N2F = torch.empty_like(gate_up_N2F)
    dgate_NF, dup_NF = dgate_up_N2F.chunk(2, dim=-1)
    bounded_NF = gate_NF.clamp(max=limit)
    sigmoid_NF = (bounded_NF * alpha).sigmoid_()
    torch.mul(doutput_NF, sigmoid_NF, out=dgate_NF)
    torch.mul(dgate_NF, bounded_NF, out=dup_NF)
    factor_NF = up_NF.clamp(-limit, limit).add_(1)
    dweights_N = (dup_NF * factor_NF).sum(-1)
    slope_NF = bounded_NF.mul_(alpha).mul_(sigmoid_NF.neg_().add_(1)).add_(1)  # of the gate's part, over the sigmoid
    dgate_NF.mul_(factor_NF).mul_(slope_NF).mul_(weights_N[:, None]).masked_fill_(gate_NF > limit, 0)
    dup_NF.mul_(weights_N[:, None]).masked_fill_(up_NF.abs() > limit, 0)
    return dgate_up_N2F, dweights_N


def _join_bounded_grad(
    doutput_NF: torch.Tensor, gate_up_N2F: torch.Tensor, weights_N: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    bounded_NF, factor_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit) + 1
    sigmoid_NF = (bounded_NF * alpha).sigmoid()
    dup_NF = doutput_NF * bounded_NF * sigmoid_NF
    slope_NF = sigmoid_NF * (1 + alpha * bounded_NF * (1 - sigmoid_NF))
    dgate_NF = (doutput_NF * factor_NF * slope_NF * weights_N[:, None]).masked_fill(gate_NF > limit, 0)
    weighted_NF = (dup_NF * weights_N[:, None]).masked_fill(up_NF.abs() > limit, 0)
    return torch.cat([dgate_NF, weighted_NF], dim=-1), (dup_NF * factor_NF).sum(-1)


_compute_bounded_grad = Chain(_write_bounded_grad, compiled=_join_bounded_grad)
