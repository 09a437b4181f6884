"""Hugging Face's Llama, Mistral, Qwen2 and Qwen3: tensor names, and config.json read and written; pure."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import TIED_HEAD, HfFamily, SplitNames, get_size
from lora_dist.model_config import ModelConfig

LLAMA_NAMES = SplitNames(
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
    "use_sliding_window": (False, (False,)),
    "quantization_config": (None, (None,)),
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALING_KEYS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ABSENT: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path, *, family: str) -> dict[str, Any]:
    config = _ABSENT[family] | dict(config)
    num_heads = get_size(config, "num_attention_heads", path)
    theta, scaling = _read_rope(config, path)
    return {
        "family": family,
        "num_layers": get_size(config, "num_hidden_layers", path),
        "hidden_size": get_size(config, "hidden_size", path),
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_size": config.get("head_dim") or get_size(config, "hidden_size", path) // num_heads,
        "ffn_hidden_size": get_size(config, "intermediate_size", path),
        "vocab_size": get_size(config, "vocab_size", path),
        "max_position_embeddings": _read_context(config, path, family),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "tied_output": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "init_std": config.get("initializer_range", 0.02),
    }


def _read_context(config: Mapping[str, Any], path: Path, family: str) -> int:
    """Positions a row may have. Up to the length of a sliding window every position sees all before it."""
    context = get_size(config, "max_position_embeddings", path)
    window = config["sliding_window"] if family == "mistral" else None
    return context if window is None else min(context, int(window))


def _read_rope(config: Mapping[str, Any], path: Path) -> tuple[float, dict[str, float]]:
    """Theta and scaling: `rope_parameters` since transformers 5, before that `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _SCALING_KEYS:
        raise ValueError(f"{path}: rope type {kind!r} is not supported, only {', '.join(_SCALING_KEYS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1.0")
    missing = [key for key in _SCALING_KEYS[kind] if not isinstance(rope.get(key), int | float)]
    if missing:
        raise ValueError(f"{path}: rope type {kind!r} has no number {missing[0]}")
    return theta, {key: float(rope[key]) for key in _SCALING_KEYS[kind]}


def _describe(model: ModelConfig) -> dict[str, Any]:
    kind = next(kind for kind, keys in _SCALING_KEYS.items() if set(keys) == set(model.rope_scaling))
    return {
        "architectures": [_ARCHITECTURES[model.family]],
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
        "rope_parameters": {"rope_type": kind, "rope_theta": model.rope_theta, **_describe_scaling(model)},
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        **({"sliding_window": None} if model.family == "mistral" else {}),
    }


def _describe_scaling(model: ModelConfig) -> dict[str, float]:
    """transformers wants the original context as an integer."""
    return {key: int(value) if key == _LLAMA3_KEYS[-1] else value for key, value in model.rope_scaling.items()}


LLAMA_FAMILIES = {
    family: HfFamily(
        settings=_SETTINGS,
        read_fields=partial(_read_fields, family=family),
        describe=_describe,
        find_parts=LLAMA_NAMES.find_parts,
        compute_shapes=LLAMA_NAMES.compute_shapes,
        ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        embedding="model.embed_tokens.weight",
    )
    for family in _ARCHITECTURES
}
