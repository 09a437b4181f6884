"""Hugging Face's text models of Qwen3.5, with experts and without: tensor names, config.json read and written; pure."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames
from lora_dist.files.hf_qwen3_next import (
    DELTA_ABSENT,
    EXPERT_MODULES,
    IGNORED,
    MLP_MODULES,
    build_names,
    describe_gated_experts,
    describe_layers,
    read_gated_experts,
    read_layers,
)
from lora_dist.model_config import ModelConfig

_INPUTS = {
    **dict.fromkeys(("in_proj_q", "in_proj_k", "in_proj_v"), "in_proj_qkv"),
    **{name: name for name in ("in_proj_z", "in_proj_b", "in_proj_a")},
}
QWEN3_5_NAMES = build_names(_INPUTS, MLP_MODULES)
QWEN3_5_MOE_NAMES = build_names(_INPUTS, EXPERT_MODULES)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
}
_ABSENT: dict[str, Any] = DELTA_ABSENT | {"num_key_value_heads": 4, "intermediate_size": 12288}
_MOE_ABSENT: dict[str, Any] = DELTA_ABSENT | {
    **{"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512},
    **{"shared_expert_intermediate_size": 512, "intermediate_size": 512},  # the last has no meaning here
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {**read_layers(_ABSENT | dict(config), path), "family": "qwen3_5_text"}


def _read_moe_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _MOE_ABSENT | dict(config)
    return {**read_layers(config, path), **read_gated_experts(config, path), "family": "qwen3_5_moe_text"}


def _describe_moe(model: ModelConfig) -> dict[str, Any]:
    return {**describe_layers(model), **describe_gated_experts(model)}


def _build_family(
    architecture: str,
    names: LayerNames,
    read_fields: Callable[[Mapping[str, Any], Path], dict[str, Any]],
    describe: Callable[[ModelConfig], dict[str, Any]],
) -> HfFamily:
    return HfFamily(
        architecture=architecture,
        settings=_SETTINGS,
        read_fields=read_fields,
        describe=describe,
        find_parts=names.find_parts,
        compute_shapes=names.compute_shapes,
        ignored=IGNORED,
        wider=re.compile(r"model\.layers\.\d+\.linear_attn\.(A_log|norm\.weight)"),
    )


QWEN3_5_FAMILIES = {
    "qwen3_5_text": _build_family("Qwen3_5ForCausalLM", QWEN3_5_NAMES, _read_fields, describe_layers),
    "qwen3_5_moe_text": _build_family("Qwen3_5MoeForCausalLM", QWEN3_5_MOE_NAMES, _read_moe_fields, _describe_moe),
}
