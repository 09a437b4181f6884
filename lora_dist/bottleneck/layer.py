"""One bottleneck as a module, whole on every process.

Shapes: N leading dimensions, H hidden features, R features of the bottleneck.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.bottleneck.spec import BottleneckSpec
from lora_dist.lora.factors import derive_seed

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Bottleneck(nn.Module):
    """x + up(activation(down(norm(x)))): near the identity at the start, so that training begins from the base.

    Parameters are fp32 and are cast to the input's dtype on use, as LoRA's factors are.
    """

    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    down_weight: nn.Parameter
    down_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, spec: BottleneckSpec, *, init_std: float, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._activate = _ACTIVATIONS[spec.activation]
        for key, shape in spec.shapes.items():
            start = draw_start(spec, key, shape, init_std, seed)
            self.register_parameter(key, nn.Parameter(start.to(device)))

    def forward(self, x_NH: torch.Tensor) -> torch.Tensor:
        dtype, normed_NH = x_NH.dtype, x_NH
        if self.spec.norm_epsilon is not None:
            weight_H, bias_H = self.norm_weight.to(dtype), self.norm_bias.to(dtype)
            normed_NH = F.layer_norm(x_NH, weight_H.shape, weight_H, bias_H, self.spec.norm_epsilon)
        z_NR = self._activate(F.linear(normed_NH, self.down_weight.to(dtype), self.down_bias.to(dtype)))
        return x_NH + F.linear(z_NR, self.up_weight.to(dtype), self.up_bias.to(dtype))


def draw_start(spec: BottleneckSpec, key: str, shape: tuple[int, ...], init_std: float, seed: int) -> torch.Tensor:
    """fp32, a function of seed and name alone, so the same at every topology.

    Normal with `init_std`, cut off at twice that (Houlsby et al., section 3.6); biases zero, the norm's weight one.
    """
    if key == "norm_weight":
        return torch.ones(shape)
    if key.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, spec.name, key))
    return nn.init.trunc_normal_(torch.empty(shape), std=init_std, a=-2 * init_std, b=2 * init_std, generator=generator)
