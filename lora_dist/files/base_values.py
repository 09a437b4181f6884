"""Parameters of the base that train beside the factors, between canonical and stored names and layouts; pure."""

from collections.abc import Iterable, Mapping

import torch

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.config import ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_layout import join_from_hf, split_to_hf


def compute_stored_shapes(names: Iterable[str], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that hold the canonical parameters `names`, by stored name without the family's prefix."""
    family = HF_FAMILIES[model.family]
    shapes = family.compute_shapes(model)
    return {part.name: shapes[part.name] for name in names for part in family.find_parts(name, model)}


def to_stored(values: Mapping[str, torch.Tensor], names: Iterable[str], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Whole canonical tensors as transformers stores them."""
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        stored |= split_to_hf(values[name], HF_FAMILIES[model.family].find_parts(name, model), model)
    return stored


def from_stored(
    stored: Mapping[str, torch.Tensor], names: Iterable[str], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `to_stored`."""
    shapes, find_parts = compute_canonical_shapes(model), HF_FAMILIES[model.family].find_parts
    return {name: join_from_hf(stored, shapes[name], find_parts(name, model), model) for name in names}
