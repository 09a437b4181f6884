"""Hugging Face's Mixtral and Qwen3 with experts: tensor names, and config.json read and written; pure.

Each expert's linears are stored one by one, as published, or stacked, as transformers has them in memory.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_size
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_positions, read_sizes, read_window
from lora_dist.model_config import ModelConfig

_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")


def _build_names(
    router: str, gate: str, up: str, down: str, beside_stacks: Mapping[str, str] | None = None
) -> LayerNames:
    return LayerNames(
        layers=LLAMA_NAMES.layers,
        modules={
            **{name: stored for name, stored in LLAMA_NAMES.modules.items() if name not in _DENSE},
            "mlp.router": router,
            "mlp.experts.{expert}.linear_fc1": {"gate_proj": gate, "up_proj": up},
            "mlp.experts.{expert}.linear_fc2": down,
        },
        others=LLAMA_NAMES.others,
        beside_stacks=beside_stacks or {},
    )


_MIXTRAL = "block_sparse_moe.experts.{expert}"
MIXTRAL_NAMES = _build_names(
    "block_sparse_moe.gate", f"{_MIXTRAL}.w1", f"{_MIXTRAL}.w3", f"{_MIXTRAL}.w2", {"block_sparse_moe.": "mlp."}
)
_QWEN3 = "mlp.experts.{expert}"
QWEN3_MOE_NAMES = _build_names("mlp.gate", f"{_QWEN3}.gate_proj", f"{_QWEN3}.up_proj", f"{_QWEN3}.down_proj")
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
}
_MIXTRAL_SETTINGS = _SETTINGS | {"router_jitter_noise": (0.0, (0.0,))}
_QWEN3_SETTINGS = _SETTINGS | {
    "use_sliding_window": (False, (False,)),
    "decoder_sparse_step": (1, (1,)),
    "mlp_only_layers": ([], ([], None)),
}
_MIXTRAL_ABSENT: dict[str, Any] = {
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "rope_theta": 1e6,
}
_QWEN3_ABSENT: dict[str, Any] = {
    **{"num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "moe_intermediate_size": 768},
    "norm_topk_prob": False,
}
_QWEN3_VL = "qwen3_vl_moe_text"
"""model_type of the text model that Qwen3-VL has, which always normalises the weights of a token's experts."""
_QWEN3_VL_ABSENT: dict[str, Any] = {
    **{"num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16, "moe_intermediate_size": 1408},
    **{"norm_topk_prob": True, "rope_theta": 500000.0},
}
"""What transformers takes where config.json does not say."""


def _read_mixtral(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _MIXTRAL_ABSENT | dict(config)
    return {
        **_read_common(config, path),
        "family": "mixtral",
        "sliding_window": read_window(config, path),
        "num_experts": get_size(config, "num_local_experts", path),
        "normalize_expert_weights": True,
    }


def _read_qwen3(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    is_of_vl = config.get("model_type") == _QWEN3_VL
    config = (_QWEN3_VL_ABSENT if is_of_vl else _QWEN3_ABSENT) | dict(config)
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"  # transformers 5, and before
    return {
        **_read_common(config, path),
        "family": "qwen3_moe",
        "ffn_hidden_size": get_size(config, "moe_intermediate_size", path),
        "num_experts": get_size(config, key, path),
        "normalize_expert_weights": is_of_vl or bool(config["norm_topk_prob"]),
    }


def _read_common(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    refuse_balancing_loss(config, path)
    return {
        **read_sizes(config, path),
        **read_positions(config, path),
        "experts_per_token": get_size(config, "num_experts_per_tok", path),
    }


def refuse_balancing_loss(config: Mapping[str, Any], path: Path) -> None:
    """ValueError where config.json asks for it."""
    if config.get("output_router_logits", False):
        raise ValueError(
            f"{path}: output_router_logits={config['output_router_logits']} asks for a loss that spreads tokens over"
            " the experts, which is not computed here; set it to false there, which changes no weight and no logit"
        )


def _describe_mixtral(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "sliding_window": model.sliding_window,
    }


def _describe_qwen3(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "moe_intermediate_size": model.ffn_hidden_size,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "norm_topk_prob": model.normalize_expert_weights,
    }


def _build_family(
    architecture: str,
    names: LayerNames,
    settings: Mapping[str, tuple[object, tuple[object, ...]]],
    read_fields: Callable[[Mapping[str, Any], Path], dict[str, Any]],
    describe: Callable[[ModelConfig], dict[str, Any]],
) -> HfFamily:
    return HfFamily(
        architecture=architecture,
        settings=settings,
        read_fields=read_fields,
        describe=describe,
        find_parts=names.find_parts,
        compute_shapes=names.compute_shapes,
        ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    )


EXPERT_FAMILIES = {
    "mixtral": _build_family("MixtralForCausalLM", MIXTRAL_NAMES, _MIXTRAL_SETTINGS, _read_mixtral, _describe_mixtral),
    "qwen3_moe": _build_family("Qwen3MoeForCausalLM", QWEN3_MOE_NAMES, _QWEN3_SETTINGS, _read_qwen3, _describe_qwen3),
}
