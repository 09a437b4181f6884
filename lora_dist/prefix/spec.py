"""What one level of trained vectors is: where in the model it is written, and its tensor."""

import math
from dataclasses import dataclass

from lora_dist.config import ModelConfig
from lora_dist.prefix_config import PrefixConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSpec:
    """A vector of `hidden_size` features for each slot."""

    layer: int | None
    """Zero-based over the whole model: the layer that the vectors enter; None in the place of word embeddings."""
    num_slots: int
    hidden_size: int

    @property
    def name(self) -> str:
        """Canonical, and the tensor's."""
        return "embedding.prefix" if self.layer is None else f"layers.{self.layer}.prefix"

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_slots, self.hidden_size

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


def build_prefix_specs(method: str, config: PrefixConfig, model: ModelConfig) -> list[PrefixSpec]:
    """All levels, other pipeline stages' too: the word embeddings, and with prefix_layer what enters each later layer.

    That makes hidden_size x (l_p + l_i) elements, and num_layers times as many: the paper's two formulas. What the last
    layer makes of the slots stays as computed: no layer reads it, and the first target token is predicted from it.
    """
    later = range(1, model.num_layers) if method.endswith("prefix_layer") else ()
    return [
        PrefixSpec(layer=layer, num_slots=config.num_slots, hidden_size=model.hidden_size) for layer in (None, *later)
    ]
