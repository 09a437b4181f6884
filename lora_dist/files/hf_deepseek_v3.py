"""Hugging Face's DeepSeek-V3 and R1, and Moonlight: tensor names, and config.json read and written; pure."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_sizes
from lora_dist.files.hf_rope import compute_mscale, describe_rope, find_factor, get_rope, read_rope
from lora_dist.files.hf_shared_experts import (
    EXTRA_LAYERS,
    MODULES,
    TENSORS,
    WIDER,
    WITHOUT_EXTRA,
    describe_shared_experts,
    read_shared_experts,
)
from lora_dist.model_config import ModelConfig
from lora_dist.refusals import require

_HEAD_BY_HEAD = ("self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm")
_LATENT = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_latent_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_latent_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
}
DEEPSEEK_V3_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **{f"self_attention.{name}": f"self_attn.{stored}" for name, stored in _LATENT.items()},
        **{name: stored for name, stored in LLAMA_NAMES.modules.items() if name not in _HEAD_BY_HEAD},
        **MODULES,
    },
    others=LLAMA_NAMES.others,
    tensors=TENSORS,
)
DEEPSEEK_V3_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "scoring_func": ("sigmoid", ("sigmoid",)),
    "topk_method": ("noaux_tc", ("noaux_tc",)),
    "moe_layer_freq": (1, (1,)),
}
"""Those from scoring_func to moe_layer_freq are of the models' own code, which transformers' does not read."""
DEEPSEEK_V3_ABSENT: dict[str, Any] = {
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "num_key_value_heads": 128, "rms_norm_eps": 1e-6},
    **{"n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    **{"n_group": 8, "topk_group": 4, "n_routed_experts": 256, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = DEEPSEEK_V3_ABSENT | dict(config)
    return {"family": "deepseek_v3", **read_latent_model(config, path, ("default", "linear", "yarn"))}


def read_latent_model(config: Mapping[str, Any], path: Path, rope_kinds: Collection[str]) -> dict[str, Any]:
    """ModelConfig's fields, of any family with attention out of latents, all but the family's name."""
    turned_size = get_size(config, "qk_rope_head_dim", path)
    head_size, value_size = (
        get_size(config, "qk_nope_head_dim", path) + turned_size,
        get_size(config, "v_head_dim", path),
    )
    require(
        value_size <= head_size,
        f"{path}: v_head_dim={value_size} exceeds qk_nope_head_dim + qk_rope_head_dim={head_size}, and the fused"
        " attention kernels want both alike, for which values alone are padded here; name a checkpoint with a smaller"
        " v_head_dim",
    )
    return {
        **read_sizes(config, path),
        **read_shared_experts(config, path),
        "head_size": head_size,
        "query_latent_size": None if config["q_lora_rank"] is None else get_size(config, "q_lora_rank", path),
        "kv_latent_size": get_size(config, "kv_lora_rank", path),
        "rope_head_size": turned_size,
        "value_head_size": value_size,
        "rope_interleaved": bool(config["rope_interleave"]),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        **read_rope(config, path, rope_kinds),
        "attention_scale": _read_attention_scale(config, path, head_size),
    }


def _read_attention_scale(config: Mapping[str, Any], path: Path, head_size: int) -> float | None:
    """A longer context makes the scores larger too, where config.json says by how much."""
    rope = get_rope(config, path)
    mscale_all_dim = get_number(rope, "mscale_all_dim", 0.0, path)
    if rope["rope_type"] == "default" or not mscale_all_dim:
        return None
    mscale = compute_mscale(find_factor(rope, config, path), mscale_all_dim)
    return None if mscale == 1 else float(head_size**-0.5 * mscale * mscale)


def describe_latent_model(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_latent_model`."""
    return {
        **describe_llama(model),
        **describe_shared_experts(model),
        "rope_parameters": {**describe_rope(model), **_describe_attention_scale(model)},
        "head_dim": model.rotary_size,
        "q_lora_rank": model.query_latent_size,
        "kv_lora_rank": model.kv_latent_size,
        "qk_rope_head_dim": model.rotary_size,
        "qk_nope_head_dim": model.head_dim - model.rotary_size,
        "v_head_dim": model.value_dim,
        "rope_interleave": model.rope_interleaved,
        "attention_bias": False,
    }


def _describe_attention_scale(model: ModelConfig) -> dict[str, float]:
    if model.attention_scale is None:
        return {}
    mscale = math.sqrt(model.attention_scale * math.sqrt(model.head_dim))
    return {"mscale_all_dim": round((mscale - 1) / (compute_mscale(model.rope_scaling["factor"], 1.0) - 1), 12)}


DEEPSEEK_V3_FAMILY = HfFamily(
    architecture="DeepseekV3ForCausalLM",
    settings=DEEPSEEK_V3_SETTINGS,
    read_fields=_read_fields,
    describe=describe_latent_model,
    find_parts=DEEPSEEK_V3_NAMES.find_parts,
    compute_shapes=DEEPSEEK_V3_NAMES.compute_shapes,
    ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    wider=WIDER,
    extra_layers=EXTRA_LAYERS,
    without_extra=WITHOUT_EXTRA,
)
