"""Hugging Face's GLM-4.5 and 4.6: tensor names, and config.json read and written; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_sizes
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
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

GLM4_MOE_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={**LLAMA_NAMES.modules, **MODULES},
    others=LLAMA_NAMES.others,
    tensors=TENSORS,
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (True,)),
}
_ABSENT: dict[str, Any] = {
    **{"num_experts_per_tok": 8, "moe_intermediate_size": 1408, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    **{"n_group": 1, "topk_group": 1, "use_qk_norm": False, "n_routed_experts": 128},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    fraction = get_number(config, "partial_rotary_factor", 0.5, path)
    return {
        "family": "glm4_moe",
        **read_sizes(config, path),
        **read_shared_experts(config, path),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "rotary_fraction": float(get_number(get_rope(config, path), "partial_rotary_factor", fraction, path)),
        **read_rope(config, path, ("default", "linear", "yarn")),
        "qk_norm": bool(config["use_qk_norm"]),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        **describe_shared_experts(model),
        "rope_parameters": {**describe_rope(model), "partial_rotary_factor": model.rotary_fraction},
        "attention_bias": True,
        "use_qk_norm": model.has_qk_norm,
    }


GLM4_MOE_FAMILY = HfFamily(
    architecture="Glm4MoeForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=GLM4_MOE_NAMES.find_parts,
    compute_shapes=GLM4_MOE_NAMES.compute_shapes,
    wider=WIDER,
    extra_layers=EXTRA_LAYERS,
    without_extra=WITHOUT_EXTRA,
)
