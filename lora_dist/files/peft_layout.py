"""An adapter in HF PEFT's files for the base's family: on GPT-2's fused c_attn, else one a projection; pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.files import peft_gpt2
from lora_dist.files.modules import FAMILY_NAMES
from lora_dist.files.peft_split import compute_split_keys, to_peft_split
from lora_dist.lora.spec import AdapterSpec


def to_peft_files(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole values by canonical name -> adapter_model.safetensors and adapter_config.json."""
    if model.family != "gpt2":
        return to_peft_split(values, specs, bias=bias, names=FAMILY_NAMES[model.family], base_name=model.checkpoint)
    tensors = peft_gpt2.to_peft_tensors(values, specs, model, bias, modules)
    return tensors, peft_gpt2.build_adapter_config(specs, bias=bias, base_name=model.checkpoint, modules=modules)


def from_peft_tensors(
    tensors: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_files` where no scaling was folded into B; exact."""
    if model.family == "gpt2":
        return peft_gpt2.from_peft_tensors(tensors, specs, model, bias, modules)
    keys = compute_split_keys(specs, FAMILY_NAMES[model.family])
    return {name: tensors[key] for name, key in keys.items()}


def compute_peft_shapes(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every key of adapter_model.safetensors and its shape."""
    if model.family == "gpt2":
        return peft_gpt2.compute_peft_shapes(specs, model, bias, modules)
    keys, shapes = compute_split_keys(specs, FAMILY_NAMES[model.family]), compute_factor_shapes(specs, model)
    return {key: shapes[name] for name, key in keys.items()}


def compute_factor_shapes(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every factor, and DoRA's row lengths, by canonical name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes[f"{spec.name}.lora_A"] = (spec.lora_rank, spec.in_features)
        shapes[f"{spec.name}.lora_B"] = (spec.out_features, spec.lora_rank)
        if spec.use_dora:
            shapes[f"{spec.name}.magnitude"] = (spec.out_features,)
    if model.family == "gpt2":  # whose fused c_attn has the lengths of all its rows
        for module in peft_gpt2.group_specs(specs):
            shapes.update(dict.fromkeys(module.magnitude_names, (module.specs[0].out_features,)))
    return shapes


def find_folded_scalings(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, float]:
    """Adapters whose B is multiplied, since PEFT has one scaling a module; none where every projection has its own."""
    if model.family != "gpt2":
        return {}
    modules = peft_gpt2.group_specs(specs)
    return {name: ratio for module in modules for name, ratio in module.compute_folded_ratios().items()}
