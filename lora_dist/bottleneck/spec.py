"""What one bottleneck is: its place in a layer, its size, its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_dist.bottleneck_config import BottleneckConfig
from lora_dist.config import ModelConfig

PLACES: Mapping[str, tuple[str, ...]] = {"adapter_h": ("attention", "mlp"), "adapter_l": ("block",)}
"""attention, mlp: on what that sublayer is about to add to the residual (AdapterH, Houlsby et al., arXiv:1902.00751);
block: on the layer's output, behind a LayerNorm of its own (AdapterL, Lin et al., arXiv:2004.03829)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckSpec:
    """x + up(activation(down(x))) over `hidden_size` features."""

    layer: int
    """Zero-based over the whole model."""
    place: str
    """attention, mlp or block."""
    hidden_size: int
    size: int
    activation: str
    norm_epsilon: float | None
    """Of the LayerNorm in front of `down`; None where there is none."""

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.place}_bottleneck"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """2 hidden_size size + size + hidden_size elements, and 2 hidden_size of the norm (the paper, section 5.1)."""
        h, r = self.hidden_size, self.size
        norm = {} if self.norm_epsilon is None else {"norm_weight": (h,), "norm_bias": (h,)}
        return {**norm, "down_weight": (r, h), "down_bias": (r,), "up_weight": (h, r), "up_bias": (h,)}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def build_bottleneck_specs(method: str, config: BottleneckConfig, model: ModelConfig) -> list[BottleneckSpec]:
    """All layers', other pipeline stages' too; `method` is adapter_h or adapter_l."""
    return [
        BottleneckSpec(
            layer=layer,
            place=place,
            hidden_size=model.hidden_size,
            size=config.size,
            activation=config.activation,
            norm_epsilon=model.layernorm_epsilon if method == "adapter_l" else None,
        )
        for layer in range(model.num_layers)
        for place in PLACES[method]
    ]
