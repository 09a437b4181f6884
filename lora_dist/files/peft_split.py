"""Adapters in PEFT's files with one pair a projection, for models whose q, k and v are linears of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_dist.files.modules import FAMILY_NAMES, is_fused
from lora_dist.files.peft_config import describe_peft_config
from lora_dist.lora.spec import AdapterSpec


def to_peft_split(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    *,
    bias: str,
    names: Mapping[str, str],
    base_name: str | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """adapter_model.safetensors and adapter_config.json.

    `names` are the templates of the adapter's own source; without any, Llama's. ValueError for trained biases, whose
    linears may have other names there.
    """
    if bias != "none":
        raise ValueError(f"format=peft_split: the adapter has trained biases (bias={bias}); use format=peft")
    tensors = {key: values[name] for name, key in compute_split_keys(specs, names).items()}
    modules = describe_split_modules(specs, names)
    config = describe_peft_config(modules, specs[0], bias=bias, base_name=base_name, fan_in_fan_out=False)
    return {key: tensors[key] for key in sorted(tensors)}, config


def compute_split_keys(specs: Sequence[AdapterSpec], names: Mapping[str, str]) -> dict[str, str]:
    """Canonical name of each factor, and of DoRA's row lengths -> key of adapter_model.safetensors."""
    keys: dict[str, str] = {}
    for spec in specs:
        module = f"base_model.model.{_find_module(spec, names)}"
        keys |= {f"{spec.name}.{kind}": f"{module}.{kind}.weight" for kind in ("lora_A", "lora_B")}
        if spec.use_dora:
            keys[f"{spec.name}.magnitude"] = f"{module}.lora_magnitude_vector"
    return keys


def describe_split_modules(specs: Sequence[AdapterSpec], names: Mapping[str, str]) -> dict[str, tuple[int, float]]:
    """Full name of each adapted linear -> its rank and alpha."""
    return {_find_module(spec, names): (spec.lora_rank, spec.alpha) for spec in specs}


def _find_module(spec: AdapterSpec, names: Mapping[str, str]) -> str:
    """Full name of the linear; where the source's is fused, Llama's."""
    template = names.get(spec.target)
    if template is None or is_fused(template):
        template = FAMILY_NAMES["llama"][spec.target]
    return template.format(layer=spec.layer)
