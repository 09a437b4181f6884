"""One level of trained vectors as a module, whole on every process.

Shapes: X and Y positions and rows in either order, H hidden features, N slots.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.lora.factors import derive_seed
from lora_dist.prefix.spec import PrefixSpec


class PrefixVectors(nn.Module):
    """Writes its vectors over what was computed at the slots. fp32, cast to the activations' dtype on use."""

    def __init__(self, spec: PrefixSpec, *, init_std: float, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.vectors_NH = nn.Parameter(draw_start(spec, init_std, seed).to(device))

    def forward(self, hidden_XYH: torch.Tensor, slots_XY: torch.Tensor) -> torch.Tensor:
        """`slots_XY` is the slot's number where there is one, from 1, and 0 elsewhere."""
        vectors_XYH = F.embedding((slots_XY - 1).clamp(min=0), self.vectors_NH.to(hidden_XYH.dtype))
        return torch.where(slots_XY[..., None] > 0, vectors_XYH, hidden_XYH)


def draw_start(spec: PrefixSpec, init_std: float, seed: int) -> torch.Tensor:
    """fp32, a function of seed and name alone, so the same at every topology."""
    generator = torch.Generator().manual_seed(derive_seed(seed, spec.name))
    return torch.randn(spec.shape, generator=generator) * init_std
