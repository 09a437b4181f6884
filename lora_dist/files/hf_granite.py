"""Hugging Face's dense Granite: config.json read and written, its tensors named as Llama's; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, get_number
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_positions, read_sizes
from lora_dist.model_config import ModelConfig

_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
}
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_divisor": "logits_scaling",
}
"""ModelConfig's fields and config.json's keys, all of them 1 where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    multipliers = {field: float(get_number(config, key, 1.0, path)) for field, key in _MULTIPLIERS.items()}
    return {"family": "granite", **read_sizes(config, path), **read_positions(config, path), **multipliers}


def _describe(model: ModelConfig) -> dict[str, Any]:
    multipliers = {key: getattr(model, field) for field, key in _MULTIPLIERS.items()}
    if model.attention_scale is None:
        multipliers["attention_multiplier"] = model.head_dim**-0.5
    return {**describe_llama(model), **multipliers}


GRANITE_FAMILY = HfFamily(
    architecture="GraniteForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=LLAMA_NAMES.find_parts,
    compute_shapes=LLAMA_NAMES.compute_shapes,
)
