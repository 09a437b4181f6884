"""Hugging Face's Qwen3-Next: tensor names, and config.json read and written; with what Qwen3.5 has alike; pure.

Each expert's linears are stored one by one, or stacked (Qwen3.5, as published).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_experts import refuse_balancing_loss
from lora_dist.files.hf_layout import HfFamily, LayerNames, get_size
from lora_dist.files.hf_llama import FULL_LAYER, LLAMA_NAMES, describe_llama, read_sizes
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.model_config import ModelConfig

DELTA_LAYER = "linear_attention"
_CORE = "self_attention.core_attention"
_LINEARS = ("gate_proj", "up_proj")
MLP_MODULES = {name: stored for name, stored in LLAMA_NAMES.modules.items() if name.startswith("mlp.")}
EXPERT_MODULES: dict[str, str | Mapping[str, str]] = {
    "mlp.router": "mlp.gate",
    "mlp.experts.{expert}.linear_fc1": {name: f"mlp.experts.{{expert}}.{name}" for name in _LINEARS},
    "mlp.experts.{expert}.linear_fc2": "mlp.experts.{expert}.down_proj",
    "mlp.shared_experts.linear_fc1": {f"shared_{name}": f"mlp.shared_expert.{name}" for name in _LINEARS},
    "mlp.shared_experts.linear_fc2": "mlp.shared_expert.down_proj",
    "mlp.shared_experts.gate": "mlp.shared_expert_gate",
}


def build_names(inputs: Mapping[str, str], mlp_modules: Mapping[str, str | Mapping[str, str]]) -> LayerNames:
    """`inputs`: the stored linear of each target that enters a gated DeltaNet's heads."""
    return LayerNames(
        layers=LLAMA_NAMES.layers,
        modules={
            **{name: stored for name, stored in LLAMA_NAMES.modules.items() if name not in MLP_MODULES},
            "self_attention.linear_in": {target: f"linear_attn.{name}" for target, name in inputs.items()},
            "self_attention.linear_out": "linear_attn.out_proj",
            **mlp_modules,
        },
        tensors={
            f"{_CORE}.decay_logs": "linear_attn.A_log",
            f"{_CORE}.step_offsets": "linear_attn.dt_bias",
            f"{_CORE}.norm_factors": "linear_attn.norm.weight",
        },
        kernels={
            f"{_CORE}.kernels": dict.fromkeys(("conv_query", "conv_key", "conv_value"), "linear_attn.conv1d.weight")
        },
        others=LLAMA_NAMES.others,
    )


QWEN3_NEXT_NAMES = build_names({name: name for name in ("in_proj_qkvz", "in_proj_ba")}, EXPERT_MODULES)
IGNORED = re.compile(r"mtp\..+")
"""The layer that predicts a second token, which transformers leaves out too."""
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "use_sliding_window": (False, (False,)),
    "decoder_sparse_step": (1, (1,)),
    "mlp_only_layers": ([], ([], None)),
}
_DELTA_SIZES = {
    "delta_key_heads": "linear_num_key_heads",
    "delta_value_heads": "linear_num_value_heads",
    "delta_key_size": "linear_key_head_dim",
    "delta_value_size": "linear_value_head_dim",
    "delta_kernel_size": "linear_conv_kernel_dim",
}
DELTA_ABSENT: dict[str, Any] = {
    **{"head_dim": 256, "partial_rotary_factor": 0.25, "full_attention_interval": 4},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128},
    **{"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
}
_ABSENT: dict[str, Any] = DELTA_ABSENT | {
    **{"num_key_value_heads": 2, "intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10},
    **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    return {
        **read_layers(config, path),
        **read_gated_experts(config, path),
        "family": "qwen3_next",
        "normalize_expert_weights": bool(config["norm_topk_prob"]),
    }


def read_layers(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """ModelConfig's fields but the family and the experts."""
    rope = get_rope(config, path)
    return {
        **read_sizes(config, path),
        **{field: get_size(config, key, path) for field, key in _DELTA_SIZES.items()},
        "full_attention_layers": _read_attention_layers(config, path),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "rotary_fraction": float(rope.get("partial_rotary_factor") or config["partial_rotary_factor"]),
        **read_rope(config, path, ("default", "linear", "yarn")),
    }


def read_gated_experts(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """ModelConfig's fields that these decide."""
    refuse_balancing_loss(config, path)
    return {
        "ffn_hidden_size": get_size(config, "moe_intermediate_size", path),
        "num_experts": get_size(config, "num_local_experts" if "num_local_experts" in config else "num_experts", path),
        "experts_per_token": get_size(config, "num_experts_per_tok", path),
        "shared_ffn_size": get_size(config, "shared_expert_intermediate_size", path),
    }


def _read_attention_layers(config: Mapping[str, Any], path: Path) -> list[int]:
    """Every fourth where config.json neither lists the layers' kinds nor says otherwise."""
    kinds, num_layers = config.get("layer_types"), get_size(config, "num_hidden_layers", path)
    if kinds is None:
        interval = get_size(config, "full_attention_interval", path)
        return [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {FULL_LAYER, DELTA_LAYER}:
        raise ValueError(f"{path}: layer_types is not a list of {num_layers} times {FULL_LAYER} or {DELTA_LAYER}")
    return [layer for layer, kind in enumerate(kinds) if kind == FULL_LAYER]


def describe_layers(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_layers`."""
    return {
        **describe_llama(model),
        **{key: getattr(model, field) for field, key in _DELTA_SIZES.items()},
        "layer_types": [DELTA_LAYER if model.has_delta_net(layer) else FULL_LAYER for layer in range(model.num_layers)],
        "rope_parameters": {**describe_rope(model), "partial_rotary_factor": model.rotary_fraction},
    }


def describe_gated_experts(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gated_experts`."""
    return {
        "moe_intermediate_size": model.ffn_hidden_size,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "shared_expert_intermediate_size": model.shared_ffn_size,
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    norm = {"norm_topk_prob": model.normalize_expert_weights}
    return {**describe_layers(model), **describe_gated_experts(model), **norm}


QWEN3_NEXT_FAMILY = HfFamily(
    architecture="Qwen3NextForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=QWEN3_NEXT_NAMES.find_parts,
    compute_shapes=QWEN3_NEXT_NAMES.compute_shapes,
    ignored=IGNORED,
)
