"""Hugging Face's Llama, Mistral, Qwen2 and Qwen3: tensor names, and config.json read and written; pure."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import TIED_HEAD, HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.model_config import ModelConfig

LLAMA_NAMES = LayerNames(
    layers="model.layers.{layer}.",
    modules={
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": {
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
        },
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": {"gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"},
        "mlp.linear_fc2": "mlp.down_proj",
    },
    others={
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": TIED_HEAD,
        "decoder.final_layernorm.weight": "model.norm.weight",
    },
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "use_sliding_window": (False, (False, True)),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FULL_LAYER, WINDOW_LAYER = "full_attention", "sliding_attention"
_ABSENT: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
"""What transformers takes where config.json does not say."""


def read_sizes(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """ModelConfig's fields but the family, the context and what turns the positions."""
    num_heads = get_size(config, "num_attention_heads", path)
    return {
        "num_layers": get_size(config, "num_hidden_layers", path),
        "hidden_size": get_size(config, "hidden_size", path),
        "num_heads": num_heads,
        "num_kv_heads": _get_size_or(config, "num_key_value_heads", num_heads, path),
        "head_size": _get_size_or(config, "head_dim", get_size(config, "hidden_size", path) // num_heads, path),
        "ffn_hidden_size": get_size(config, "intermediate_size", path),
        "vocab_size": get_size(config, "vocab_size", path),
        "layernorm_epsilon": get_number(config, "rms_norm_eps", 1e-6, path),
        "tied_output": bool(config.get("tie_word_embeddings", False)),
        "attention_dropout": get_number(config, "attention_dropout", 0.0, path),
        "init_std": get_number(config, "initializer_range", 0.02, path),
    }


def _get_size_or(config: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    return default if config.get(key) is None else get_size(config, key, path)


def _read_fields(config: Mapping[str, Any], path: Path, *, family: str) -> dict[str, Any]:
    config = _ABSENT[family] | dict(config)
    fields = {"family": family, **read_sizes(config, path), **read_positions(config, path)}
    if family == "mistral":  # with layer_types transformers takes it for Ministral, whose windows are layer by layer
        fields |= _read_windows(config, path, [])
    if family in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        num_full = get_number(config, "max_window_layers", fields["num_layers"], path)
        fields |= _read_windows(config, path, [layer for layer in range(fields["num_layers"]) if layer < num_full])
    return fields


def _read_windows(config: Mapping[str, Any], path: Path, absent: list[int]) -> dict[str, Any]:
    """Those of layers that config.json lists, or of all but the `absent` ones."""
    full_layers, window = read_full_layers(config, path, absent), read_window(config, path)
    if window is None or len(full_layers) == get_size(config, "num_hidden_layers", path):
        return {}
    return {"sliding_window": window, "full_attention_layers": full_layers}


def read_full_layers(config: Mapping[str, Any], path: Path, absent: list[int]) -> list[int]:
    """Layers without a window; those `absent` where config.json does not list the layers' kinds."""
    kinds, num_layers = config.get("layer_types"), get_size(config, "num_hidden_layers", path)
    if kinds is None:
        return absent
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {FULL_LAYER, WINDOW_LAYER}:
        raise ValueError(f"{path}: layer_types is not a list of {num_layers} times {FULL_LAYER} or {WINDOW_LAYER}")
    return [layer for layer, kind in enumerate(kinds) if kind == FULL_LAYER]


def describe_layer_types(model: ModelConfig) -> list[str]:
    """The inverse of `read_full_layers`."""
    return [WINDOW_LAYER if model.sees_window(layer) else FULL_LAYER for layer in range(model.num_layers)]


def read_window(config: Mapping[str, Any], path: Path) -> int | None:
    """None where a position sees all before it."""
    return None if config.get("sliding_window") is None else get_size(config, "sliding_window", path)


def read_positions(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The context and the rotary fields. Where YaRN was put into config.json by hand, max_position_embeddings is often
    the context that it starts from.
    """
    fraction = get_rope(config, path).get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor={fraction} is not supported, only 1.0")
    rope = read_rope(config, path, ("default", "linear", "llama3", "yarn"))
    context, scaling = get_size(config, "max_position_embeddings", path), rope["rope_scaling"]
    if "beta_fast" in scaling:
        context = max(context, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
    return {"max_position_embeddings": context, **rope}


def describe_llama(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that all of them have."""
    return {
        "model_type": model.family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.tied_output,
        "rope_parameters": describe_rope(model),
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    described = describe_llama(model)
    if not model.architecture.windows:
        return described
    described["sliding_window"] = model.sliding_window
    if model.family != "mistral" and model.sliding_window is not None:
        described |= {"use_sliding_window": True, "layer_types": describe_layer_types(model)}
    elif model.full_attention_layers:  # of a Mistral, which without a list stays one for transformers
        described["layer_types"] = describe_layer_types(model)
    return described


LLAMA_FAMILIES = {
    family: HfFamily(
        architecture=architecture,
        settings=_SETTINGS,
        read_fields=partial(_read_fields, family=family),
        describe=_describe,
        find_parts=LLAMA_NAMES.find_parts,
        compute_shapes=LLAMA_NAMES.compute_shapes,
        ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    )
    for family, architecture in _ARCHITECTURES.items()
}
