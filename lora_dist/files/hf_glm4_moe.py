"""Hugging Face's GLM-4.5 to 4.7: tensor names, and config.json read and written; pure.

Each expert's linears are stored one by one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.base_shapes import CHOICE_OFFSETS
from lora_dist.files.hf_experts import refuse_balancing_loss
from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_sizes
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.model_config import ModelConfig

_LINEARS = ("gate_proj", "up_proj")
GLM4_MOE_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **LLAMA_NAMES.modules,
        "mlp.router": "mlp.gate",
        "mlp.experts.{expert}.linear_fc1": {name: f"mlp.experts.{{expert}}.{name}" for name in _LINEARS},
        "mlp.experts.{expert}.linear_fc2": "mlp.experts.{expert}.down_proj",
        "mlp.shared_experts.linear_fc1": {f"shared_{name}": f"mlp.shared_experts.{name}" for name in _LINEARS},
        "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
    },
    others=LLAMA_NAMES.others,
    tensors={CHOICE_OFFSETS: "mlp.gate.e_score_correction_bias"},
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (True,)),
    "quantization_config": (None, (None,)),
}
_ABSENT: dict[str, Any] = {
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 1408, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    **{"n_group": 1, "topk_group": 1, "use_qk_norm": False, "n_routed_experts": 128},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    refuse_balancing_loss(config, path)
    config = _ABSENT | dict(config)
    expert_size, num_dense = get_size(config, "moe_intermediate_size", path), _read_num_dense(config, path)
    fraction = get_number(config, "partial_rotary_factor", 0.5, path)
    return {
        "family": "glm4_moe",
        **read_sizes(config, path),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "rotary_fraction": float(get_number(get_rope(config, path), "partial_rotary_factor", fraction, path)),
        **read_rope(config, path, ("default", "linear", "yarn")),
        "qk_norm": bool(config["use_qk_norm"]),
        "ffn_hidden_size": expert_size,
        "num_experts": get_size(config, "num_local_experts" if _is_given(config) else "n_routed_experts", path),
        "experts_per_token": get_size(config, "num_experts_per_tok", path),
        "normalize_expert_weights": bool(config["norm_topk_prob"]),
        "expert_weight_scale": float(get_number(config, "routed_scaling_factor", 1.0, path)),
        "num_expert_groups": get_size(config, "n_group", path),
        "groups_per_token": get_size(config, "topk_group", path),
        "shared_ffn_size": expert_size * get_size(config, "n_shared_experts", path),
        "num_dense_layers": num_dense,
        "dense_ffn_size": get_size(config, "intermediate_size", path) if num_dense else None,
    }


def _read_num_dense(config: Mapping[str, Any], path: Path) -> int:
    key = "first_k_dense_replace"
    return 0 if config[key] == 0 else get_size(config, key, path)


def _is_given(config: Mapping[str, Any]) -> bool:
    """Under the name that transformers 5 has in memory."""
    return "num_local_experts" in config


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "rope_parameters": {**describe_rope(model), "partial_rotary_factor": model.rotary_fraction},
        "attention_bias": True,
        "use_qk_norm": model.has_qk_norm,
        "intermediate_size": model.dense_ffn_size or model.ffn_hidden_size,
        "moe_intermediate_size": model.ffn_hidden_size,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "norm_topk_prob": model.normalize_expert_weights,
        "routed_scaling_factor": model.expert_weight_scale,
        "n_group": model.num_expert_groups,
        "topk_group": model.groups_per_token,
        "n_shared_experts": (model.shared_ffn_size or 0) // model.ffn_hidden_size,
        "first_k_dense_replace": model.num_dense_layers,
        "num_nextn_predict_layers": 0,
    }


GLM4_MOE_FAMILY = HfFamily(
    architecture="Glm4MoeForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=GLM4_MOE_NAMES.find_parts,
    compute_shapes=GLM4_MOE_NAMES.compute_shapes,
    ignored=re.compile(r"(?!)"),  # nothing
    embedding="model.embed_tokens.weight",
    wider=re.compile(r"model\.layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)"),
    extra_layers=re.compile(r"model\.layers\.(\d+)\..+"),
    without_extra={"num_nextn_predict_layers": 0},
)
