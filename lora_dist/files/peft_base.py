"""Biases and whole modules of the base under the keys of PEFT's adapter files; pure."""

from collections.abc import Mapping, Sequence

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.base_values import compute_stored_shapes, from_stored, to_stored
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_layout import TIED_HEAD
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import find_linear
from lora_dist.lora.trained_base import list_trained_base

KEY_PREFIX = "base_model.model."
_HEAD_KEY = f"{KEY_PREFIX}{TIED_HEAD}"


def find_base_keys(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str]
) -> dict[str, str]:
    """Key -> stored name without the family's prefix.

    PEFT moves an adapted linear's own parameters to its `base_layer`. It would leave a tied output layer at the base's
    embedding, so a trained embedding has a copy there.
    """
    family, adapted = HF_FAMILIES[model.family], _find_adapted(specs, model)
    keys = {}
    for name in compute_stored_shapes(list_trained_base(specs, model, bias, modules), model):
        module, _, kind = name.rpartition(".")
        keys[
            f"{KEY_PREFIX}{family.find_module(name, model.wrapper)}{'.base_layer' if module in adapted else ''}.{kind}"
        ] = name
    if model.tied_output and family.embedding in keys.values():
        keys[_HEAD_KEY] = family.embedding
    return keys


def compute_base_shapes(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """By key."""
    shapes = HF_FAMILIES[model.family].compute_shapes(model)
    return {key: shapes[name] for key, name in find_base_keys(specs, model, bias, modules).items()}


def to_peft_base(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Whole canonical tensors -> tensors by key."""
    stored = to_stored(values, list_trained_base(specs, model, bias, modules), model)
    return {key: stored[name] for key, name in find_base_keys(specs, model, bias, modules).items()}


def from_peft_base(
    tensors: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str],
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_base`."""
    stored = {name: tensors[key] for key, name in find_base_keys(specs, model, bias, modules).items()}
    return from_stored(stored, list_trained_base(specs, model, bias, modules), model)


def _find_adapted(specs: Sequence[AdapterSpec], model: ModelConfig) -> set[str]:
    """Stored names of the linears that have adapters."""
    find_parts = HF_FAMILIES[model.family].find_parts
    return {
        part.name.removesuffix(".weight")
        for spec in specs
        if spec.num_experts is None  # transformers has no module of an expert's linear
        for part in find_parts(f"decoder.layers.{spec.layer}.{find_linear(spec.target, model)}.weight", model)
        if part.target in (None, spec.target)
    }
