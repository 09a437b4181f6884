"""Hugging Face's text models of Gemma 3: tensor names, and config.json read and written; pure."""

import re
from collections.abc import Mapping
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
    read_sizes,
    read_window,
)
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.model_config import ModelConfig

GEMMA3_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **LLAMA_NAMES.modules,
        "self_attention.output_layernorm": "post_attention_layernorm",
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "mlp.output_layernorm": "post_feedforward_layernorm",
    },
    others=LLAMA_NAMES.others,
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_activation": ("gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
    "attention_bias": (False, (False,)),
    "attn_logit_softcapping": (None, (None,)),
    "final_logit_softcapping": (None, (None,)),
    "use_bidirectional_attention": (False, (False, None)),
}
_ABSENT: dict[str, Any] = {
    **{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "max_position_embeddings": 131072},
    **{"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256},
    **{"tie_word_embeddings": True, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    sizes, ropes = read_sizes(config, path), _split_ropes(config, path)
    full = ropes[FULL_LAYER]
    theta = full.get("rope_theta", config["rope_theta"])  # stays where transformers puts a rope_scaling into `full`
    return {
        "family": "gemma3_text",
        **sizes,
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        **read_rope(config | {"rope_parameters": full, "rope_theta": theta}, path, ("default", "linear")),
        "sliding_window": read_window(config, path),
        "full_attention_layers": read_full_layers(config, path, _list_by_pattern(config, path, sizes["num_layers"])),
        "local_rope_theta": _read_local_theta(config, path, ropes[WINDOW_LAYER]),
        "attention_scale": get_number(config, "query_pre_attn_scalar", 256, path) ** -0.5,
    }


def _split_ropes(config: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The settings of each kind of layer; before transformers 5 there were those of the layers without window alone.

    A rope_scaling beside them is of the layers without window too, where `read_rope` compares the two.
    """
    rope = get_rope({"rope_parameters": config.get("rope_parameters") or config.get("rope_scaling")}, path)
    return {FULL_LAYER: rope.get(FULL_LAYER, rope), WINDOW_LAYER: rope.get(WINDOW_LAYER, {})}


def _read_local_theta(config: Mapping[str, Any], path: Path, rope: Mapping[str, Any]) -> float:
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{path}: rope type {kind!r} of {WINDOW_LAYER} is not supported, only default")
    return float(get_number(rope, "rope_theta", get_number(config, "rope_local_base_freq", 1e4, path), path))


def _list_by_pattern(config: Mapping[str, Any], path: Path, num_layers: int) -> list[int]:
    """The last of every `sliding_window_pattern` layers sees all positions."""
    pattern = get_size(config, "sliding_window_pattern", path)
    return [layer for layer in range(num_layers) if (layer + 1) % pattern == 0]


def _describe(model: ModelConfig) -> dict[str, Any]:
    assert model.attention_scale is not None
    local = {"rope_type": "default", "rope_theta": model.local_rope_theta or model.rope_theta}
    described = describe_llama(model)
    del described["hidden_act"]
    return {
        **described,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {FULL_LAYER: describe_rope(model), WINDOW_LAYER: local},
        "sliding_window": model.sliding_window,
        "layer_types": describe_layer_types(model),
        "query_pre_attn_scalar": round(model.attention_scale**-2),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the defaults are of Gemma's vocabulary
    }


GEMMA3_FAMILY = HfFamily(
    architecture="Gemma3ForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=GEMMA3_NAMES.find_parts,
    compute_shapes=GEMMA3_NAMES.compute_shapes,
    ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)
