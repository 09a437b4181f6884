"""Hugging Face's MiniMax-M2, M2.1 and M2.5: tensor names, and config.json read and written; pure.

Experts are stored one by one under Mixtral's names, as published, or stacked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.base_shapes import CHOICE_OFFSETS
from lora_dist.files.hf_experts import MIXTRAL_NAMES, refuse_balancing_loss
from lora_dist.files.hf_layout import HfFamily, LayerNames, get_size
from lora_dist.files.hf_llama import describe_llama, read_sizes
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.files.hf_shared_experts import EXTRA_LAYERS
from lora_dist.model_config import ModelConfig

MINIMAX_M2_NAMES = LayerNames(
    layers=MIXTRAL_NAMES.layers,
    modules={
        **MIXTRAL_NAMES.modules,
        "self_attention.layernorm_q": "self_attn.q_norm",
        "self_attention.layernorm_k": "self_attn.k_norm",
    },
    others=MIXTRAL_NAMES.others,
    tensors={CHOICE_OFFSETS: "block_sparse_moe.e_score_correction_bias"},
    beside_stacks=MIXTRAL_NAMES.beside_stacks,
)
_ALWAYS: dict[str, Any] = {
    **{"hidden_act": "silu", "use_qk_norm": True, "qk_norm_type": "per_layer"},
    **{"scoring_func": "sigmoid", "use_routing_bias": True},
}
_NEVER: dict[str, Any] = {
    **{"attention_bias": False, "sliding_window": None, "router_jitter_noise": 0.0, "shared_intermediate_size": 0},
}
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    key: (value, (value,)) for key, value in (_ALWAYS | _NEVER).items()
}
"""All but hidden_act and router_jitter_noise are of the models' own code, which transformers' does not read."""
_ABSENT: dict[str, Any] = {
    **{"num_local_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 8, "head_dim": 128},
    **{"rms_norm_eps": 1e-6, "rope_theta": 5e6},
}
"""What transformers takes where config.json does not say."""
_WITHOUT_EXTRA = {"use_mtp": False, "num_mtp_modules": 0}
_FULL = 1
"""In attn_type_list, a layer that sees all positions before."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    refuse_balancing_loss(config, path)
    _check_layers(config, path)
    return {
        "family": "minimax_m2",
        **read_sizes(config, path),
        "num_experts": get_size(config, "num_local_experts", path),
        "experts_per_token": get_size(config, "num_experts_per_tok", path),
        "normalize_expert_weights": True,
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "rotary_fraction": _read_rotary_fraction(config, path),
        **read_rope(config, path, ("default", "linear", "yarn")),
    }


def _check_layers(config: Mapping[str, Any], path: Path) -> None:
    kinds, num_layers = config.get("attn_type_list"), get_size(config, "num_hidden_layers", path)
    if kinds is not None and kinds != [_FULL] * num_layers:
        raise ValueError(
            f"{path}: attn_type_list={kinds} is not supported, only {num_layers} times {_FULL}, layers that see all"
            " positions before; name a checkpoint that has it"
        )


def _read_rotary_fraction(config: Mapping[str, Any], path: Path) -> float:
    """Published as a number of features, which transformers makes a share of."""
    stored = get_rope(config, path).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if stored is None:
        head_size = get_size(config, "head_dim", path)
        return get_size({"rotary_dim": head_size, **config}, "rotary_dim", path) / head_size
    return float(stored)


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        **_ALWAYS,
        **_WITHOUT_EXTRA,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "attn_type_list": [_FULL] * model.num_layers,
        "rope_parameters": {**describe_rope(model), "partial_rotary_factor": model.rotary_fraction},
        "rotary_dim": model.rotary_size,
    }


MINIMAX_M2_FAMILY = HfFamily(
    architecture="MiniMaxM2ForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=MINIMAX_M2_NAMES.find_parts,
    compute_shapes=MINIMAX_M2_NAMES.compute_shapes,
    wider=re.compile(r"model\.layers\.\d+\.(block_sparse_moe|mlp)\.(gate\.weight|e_score_correction_bias)"),
    extra_layers=EXTRA_LAYERS,
    without_extra=_WITHOUT_EXTRA,
)
