"""Hugging Face's gpt-oss: tensor names, and config.json read and written; pure.

A layer's experts are stored together: [experts, in, out], gate and up by turns.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_experts import refuse_balancing_loss
from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import (
    LLAMA_NAMES,
    describe_layer_types,
    describe_llama,
    read_full_layers,
    read_positions,
    read_sizes,
    read_window,
)
from lora_dist.model_config import ModelConfig

_NOT_ITS = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.q_layernorm", "self_attention.k_layernorm")
GPT_OSS_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **{name: stored for name, stored in LLAMA_NAMES.modules.items() if name not in _NOT_ITS},
        "mlp.router": "mlp.router",
    },
    others=LLAMA_NAMES.others,
    tensors={"self_attention.core_attention.sinks": "self_attn.sinks"},
    stacks={
        "linear_fc1.weight": "mlp.experts.gate_up_proj",
        "linear_fc1.bias": "mlp.experts.gate_up_proj_bias",
        "linear_fc2.weight": "mlp.experts.down_proj",
        "linear_fc2.bias": "mlp.experts.down_proj_bias",
    },
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (True, (True,)),
}
_ABSENT: dict[str, Any] = {
    **{"num_local_experts": 128, "num_experts_per_tok": 4, "num_key_value_heads": 8, "head_dim": 64},
    **{"rms_norm_eps": 1e-5, "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_theta": 150000.0},
}
_ABSENT_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_parameters"] = _ABSENT_ROPE
    refuse_balancing_loss(config, path)
    return {
        "family": "gpt_oss",
        **read_sizes(config, path),
        **read_positions(config, path),
        **_read_windows(config, path),
        "num_experts": get_size(config, "num_local_experts", path),
        "experts_per_token": get_size(config, "num_experts_per_tok", path),
        "swiglu_alpha": get_number(config, "swiglu_alpha", 1.702, path),
        "swiglu_limit": get_number(config, "swiglu_limit", 7.0, path),
    }


def _read_windows(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every second layer has none where config.json does not list the layers' kinds."""
    num_layers, window = get_size(config, "num_hidden_layers", path), read_window(config, path)
    full_layers = read_full_layers(config, path, list(range(1, num_layers, 2)))
    if window is None or len(full_layers) == num_layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full_layers}


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "attention_bias": True,
        "sliding_window": model.sliding_window,
        "layer_types": describe_layer_types(model),
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
    }


GPT_OSS_FAMILY = HfFamily(
    architecture="GptOssForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=GPT_OSS_NAMES.find_parts,
    compute_shapes=GPT_OSS_NAMES.compute_shapes,
    in_mxfp4=True,
    has_stacks=True,
)
