"""Norms that keep their output for backward, and not their input, in front of an adapted linear.

That linear keeps the norm's output anyway, as its own input, so the norm's input need not be kept at all.
Shapes: N leading dimensions, H features.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.fusion import Chain

_MIN_RATIO_LIMIT = 4.0
_MAX_ERROR = 1e-5
MIN_NORMALS = 16.0
"""Smallest weight of an RMS norm that is divided by, in units of the dtype's smallest normal number."""


class Norm(nn.LayerNorm):
    """LayerNorm with Megatron's constructor; Megatron's own torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.keeps_output = False
        """Set where something keeps the output for backward anyway: then it costs a little time and saves the input."""
        self._invertible: bool | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        frozen = not (self.weight.requires_grad or self.bias.requires_grad)
        wanted = self.keeps_output and frozen and input.requires_grad and torch.is_grad_enabled()
        if wanted and self._is_invertible():
            return _NormFromOutput.apply(input, self.weight, self.bias, self.eps)
        return super().forward(input)

    def _is_invertible(self) -> bool:
        """Whether the normalised input can be had back from the output; asked once, since the weights are frozen."""
        if self._invertible is None:
            limit = max(_MIN_RATIO_LIMIT, _MAX_ERROR / torch.finfo(self.weight.dtype).eps)
            bad_H = (self.weight == 0) | (self.bias.abs() > limit * self.weight.abs())
            self._invertible = bad_H.sum().item() == 0
        return self._invertible


class _NormFromOutput(torch.autograd.Function):
    """y = x_hat weight + bias, so x_hat = (y - bias) / weight; its rounding error is that of y times bias / weight."""

    @staticmethod
    def forward(ctx: Any, x_NH: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor, eps: float) -> torch.Tensor:
        y_NH, _, rstd_N = torch.native_layer_norm(x_NH, weight_H.shape, weight_H, bias_H, eps)
        ctx.save_for_backward(y_NH, rstd_N, weight_H, bias_H)
        return y_NH

    @staticmethod
    def backward(ctx: Any, dy_NH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _compute_norm_input_grad(dy_NH, *ctx.saved_tensors), None, None, None


@Chain
def _compute_norm_input_grad(
    dy_NH: torch.Tensor, y_NH: torch.Tensor, rstd_N: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor
) -> torch.Tensor:
    inverse_H = weight_H.reciprocal()
    normalised_NH = torch.addcmul(-bias_H * inverse_H, y_NH, inverse_H)
    # The kernel's own backward, told that its input has mean 0 and deviation 1.
    dx_NH, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy_NH,
        normalised_NH,
        weight_H.shape,
        torch.zeros_like(rstd_N),
        torch.ones_like(rstd_N),
        weight_H,
        bias_H,
        [True, False, False],
    )
    return dx_NH.mul_(rstd_N)


class RmsNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), in fp32 within; backward from its output as above."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.keeps_output = False
        """As in Norm."""
        self._invertible: bool | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        from_output = self.keeps_output and not self.weight.requires_grad and self._is_invertible()
        factor_H = self.compute_factor()
        output: torch.Tensor = _RmsNorm.apply(input, factor_H, self.eps, from_output)  # type: ignore[no-untyped-call]
        return output

    def compute_factor(self) -> torch.Tensor:
        """[H]; what the normalised input is multiplied by."""
        return self.weight

    def _is_invertible(self) -> bool:
        """Whether no factor is so small that the output has lost the input; asked once, since weights are frozen."""
        if self._invertible is None:
            bad_H = self.compute_factor().abs() < MIN_NORMALS * torch.finfo(self.weight.dtype).smallest_normal
            self._invertible = bad_H.sum().item() == 0
        return self._invertible


class UnitRmsNorm(RmsNorm):
    """Gemma's: the factor is one more than the weight, in fp32, so that a weight of 16 bits is exact near one."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(config, hidden_size, eps, **options)
        nn.init.zeros_(self.weight)

    def compute_factor(self) -> torch.Tensor:
        return 1 + upcast(self.weight)


class _RmsNorm(torch.autograd.Function):
    """y = x rstd weight; keeps x or, where `from_output`, y, and rstd [N, 1]."""

    @staticmethod
    def forward(ctx: Any, x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, from_output: bool) -> torch.Tensor:
        y_NH, rstd_N1 = _divide_by_rms(x_NH, weight_H, eps)
        ctx.save_for_backward(y_NH if from_output else x_NH, rstd_N1, weight_H)
        ctx.from_output = from_output
        return y_NH

    @staticmethod
    def backward(ctx: Any, dy_NH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        kept_NH, rstd_N1, weight_H = ctx.saved_tensors
        gradients = _compute_rms_grads(dy_NH, kept_NH, rstd_N1, weight_H, ctx.from_output, ctx.needs_input_grad[:2])
        return *gradients, None, None


@Chain
def _divide_by_rms(x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and what it was multiplied by [N, 1]."""
    exact_NH = upcast(x_NH)
    rstd_N1 = exact_NH.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (exact_NH * rstd_N1).mul_(weight_H).to(x_NH.dtype), rstd_N1


@Chain
def _compute_rms_grads(
    dy_NH: torch.Tensor,
    kept_NH: torch.Tensor,
    rstd_N1: torch.Tensor,
    weight_H: torch.Tensor,
    from_output: bool,
    needed: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of the input and of the weight, those that are needed; `kept_NH` is the output or the input."""
    normalised_NH = upcast(kept_NH) / upcast(weight_H) if from_output else upcast(kept_NH) * rstd_N1
    dx_NH = dweight_H = None
    if needed[1]:
        dweight_H = (upcast(dy_NH) * normalised_NH).flatten(0, -2).sum(0).to(weight_H.dtype)
    if needed[0]:
        scaled_NH = upcast(dy_NH) * weight_H
        share_N1 = (scaled_NH * normalised_NH).mean(-1, keepdim=True)
        dx_NH = scaled_NH.sub_(normalised_NH.mul_(share_N1)).mul_(rstd_N1).to(dy_NH.dtype)
    return dx_NH, dweight_H


def find_norm(model: ModelConfig) -> type[nn.Module]:
    """The class of all of the model's norms of hidden vectors."""
    if model.architecture.unit_norms:
        return UnitRmsNorm
    return RmsNorm if model.architecture.rms_norm else Norm


def build_output_norm(config: TransformerConfig) -> nn.Module | None:
    """Of what attention or the MLP gives, where the model has such norms."""
    model: ModelConfig = config.model
    if not model.architecture.output_norms:
        return None
    return find_norm(model)(config, config.hidden_size, config.layernorm_epsilon)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
