"""Adapters in PEFT's files with one pair a projection, for models whose q, k and v are linears of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_dist.files.modules import LLAMA_NAMES, is_fused
from lora_dist.files.peft_gpt2 import describe_peft_config
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

    `names` are the templates of the adapter's own source; without any, Llama's. ValueError for trained biases, which
    belong to GPT-2's fused linears.
    """
    if bias != "none":
        raise ValueError(f"format=peft_split: the adapter has trained biases (bias={bias}); use format=peft")
    templates = LLAMA_NAMES | {target: name for target, name in names.items() if not is_fused(name)}
    tensors, modules = {}, {}
    for spec in specs:
        name = templates[spec.target].format(layer=spec.layer)
        for kind in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{name}.{kind}.weight"] = values[f"{spec.name}.{kind}"]
        if spec.use_dora:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = values[f"{spec.name}.magnitude"]
        modules[name] = (spec.lora_rank, spec.alpha)
    config = describe_peft_config(modules, specs[0], bias=bias, base_name=base_name, fan_in_fan_out=False)
    return {key: tensors[key] for key in sorted(tensors)}, config
