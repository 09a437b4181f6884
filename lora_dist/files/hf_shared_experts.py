"""What the families with a shared expert have alike in Hugging Face's files: GLM-4.5, DeepSeek-V3; pure.

Each expert's linears are stored one by one, or stacked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.base_shapes import CHOICE_OFFSETS
from lora_dist.files.hf_experts import refuse_balancing_loss
from lora_dist.files.hf_layout import get_number, get_size
from lora_dist.model_config import ModelConfig

_LINEARS = ("gate_proj", "up_proj")
MODULES: dict[str, str | Mapping[str, str]] = {
    "mlp.router": "mlp.gate",
    "mlp.experts.{expert}.linear_fc1": {name: f"mlp.experts.{{expert}}.{name}" for name in _LINEARS},
    "mlp.experts.{expert}.linear_fc2": "mlp.experts.{expert}.down_proj",
    "mlp.shared_experts.linear_fc1": {f"shared_{name}": f"mlp.shared_experts.{name}" for name in _LINEARS},
    "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
}
TENSORS = {CHOICE_OFFSETS: "mlp.gate.e_score_correction_bias"}
WIDER = re.compile(r"model\.layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)")
EXTRA_LAYERS = re.compile(r"model\.layers\.(\d+)\..+")
WITHOUT_EXTRA = {"num_nextn_predict_layers": 0}


def read_shared_experts(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """ModelConfig's fields that the experts and the layers without them decide."""
    refuse_balancing_loss(config, path)
    expert_size, num_dense = get_size(config, "moe_intermediate_size", path), _read_num_dense(config, path)
    return {
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


def describe_shared_experts(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_shared_experts`."""
    return {
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
        **WITHOUT_EXTRA,
    }
