"""Hugging Face's OLMo 2 and OLMo 3: tensor names, and config.json read and written; pure."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import (
    FULL_LAYER,
    LLAMA_NAMES,
    WINDOW_LAYER,
    describe_layer_types,
    describe_llama,
    read_full_layers,
    read_positions,
    read_sizes,
)
from lora_dist.files.hf_rope import describe_rope, get_rope
from lora_dist.model_config import ModelConfig

_NOT_ITS = ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm")
OLMO2_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **{name: stored for name, stored in LLAMA_NAMES.modules.items() if name not in _NOT_ITS},
        "self_attention.layernorm_q": "self_attn.q_norm",
        "self_attention.layernorm_k": "self_attn.k_norm",
        "self_attention.output_layernorm": "post_attention_layernorm",
        "mlp.output_layernorm": "post_feedforward_layernorm",
    },
    others=LLAMA_NAMES.others,
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
}
_THETA = 5e5
_ABSENT: dict[str, dict[str, Any]] = {
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "rope_theta": _THETA, "sliding_window": 4096},
}
"""What transformers takes where config.json does not say."""
_PATTERN = 4
"""Of so many layers of an OLMo 3 the last one sees all positions, unless config.json lists the layers' kinds."""


def _read_fields(config: Mapping[str, Any], path: Path, *, family: str) -> dict[str, Any]:
    config = _ABSENT[family] | dict(config)
    read_rest = _read_windows if family == "olmo3" else read_positions
    return {"family": family, **read_sizes(config, path), **read_rest(config, path)}


def _read_windows(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The context and the rotary fields of an OLMo 3, and which layers have a window, under which nothing is scaled."""
    num_layers = get_size(config, "num_hidden_layers", path)
    full, local = _split_ropes(config, path)
    positions = read_positions({**config, "rope_parameters": full}, path)
    absent = [layer for layer in range(num_layers) if (layer + 1) % _PATTERN == 0]
    full_layers = read_full_layers(config, path, absent)
    if len(full_layers) == num_layers:
        return positions
    return {
        **positions,
        "sliding_window": get_size(config, "sliding_window", path),
        "full_attention_layers": full_layers,
        "local_rope_theta": float(get_number(local, "rope_theta", _THETA, path)),
    }


def _split_ropes(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rule of layers without a window and that of layers with one. A rope_scaling, as published, is of the first
    alone. ValueError where transformers' versions make different things of what is there.
    """
    rules = get_rope({"rope_parameters": config.get("rope_parameters")}, path)
    full, local = (dict(rules.get(kind) or {}) for kind in (FULL_LAYER, WINDOW_LAYER))
    thetas = {_THETA, rules.get("rope_theta", _THETA), *([] if local else [config["rope_theta"]])}
    if not (full or local) and (rules["rope_type"] != "default" or len(thetas) > 1):
        raise ValueError(
            f"{path}: rope_parameters={config.get('rope_parameters')} and rope_theta={config['rope_theta']} do not say"
            f" which layers they are for; write rope_parameters={{{FULL_LAYER}: ..., {WINDOW_LAYER}: ...}}, each with"
            " its rope_type and rope_theta"
        )
    kind = local.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{path}: rope type {kind!r} of {WINDOW_LAYER} is not supported, only default")
    return full, local


def _describe(model: ModelConfig) -> dict[str, Any]:
    if model.family == "olmo2":
        return describe_llama(model)
    local = {"rope_type": "default", "rope_theta": model.local_rope_theta or model.rope_theta}
    return {
        **describe_llama(model),
        "rope_parameters": {FULL_LAYER: describe_rope(model), WINDOW_LAYER: local},
        "sliding_window": model.sliding_window,
        "layer_types": describe_layer_types(model),
    }


OLMO_FAMILIES = {
    family: HfFamily(
        architecture=architecture,
        settings=_SETTINGS,
        read_fields=partial(_read_fields, family=family),
        describe=_describe,
        find_parts=OLMO2_NAMES.find_parts,
        compute_shapes=OLMO2_NAMES.compute_shapes,
    )
    for family, architecture in (("olmo2", "Olmo2ForCausalLM"), ("olmo3", "Olmo3ForCausalLM"))
}
