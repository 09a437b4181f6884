"""Hugging Face's text models of Ministral 3: config.json read and written, their tensors named as Llama's; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_positions, read_sizes, read_window
from lora_dist.files.hf_rope import describe_rope, get_rope, read_rope
from lora_dist.model_config import ModelConfig

_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "layer_types": (None, (None,)),
}
_ABSENT: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
_ABSENT_RULE: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
"""What transformers takes where config.json does not say, and where it has no rotary rule."""
_GROWTH = "llama_4_scaling_beta"


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = _ABSENT_RULE
    read_rope(config, path, ("yarn",))
    growth = get_rope(config, path).get(_GROWTH)
    if not isinstance(growth, int | float):
        raise ValueError(
            f"{path}: {_GROWTH}={growth!r} of rope_parameters is not a number; transformers cannot compute such a"
            " model: write 0 where queries do not grow with their position"
        )
    return {
        "family": "ministral3",
        **read_sizes(config, path),
        **read_positions(config, path),
        "query_growth": float(growth),
        "sliding_window": read_window(config, path),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "rope_parameters": {**describe_rope(model), _GROWTH: model.query_growth},
        "sliding_window": model.sliding_window,
    }


MINISTRAL3_FAMILY = HfFamily(
    architecture="Ministral3ForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=LLAMA_NAMES.find_parts,
    compute_shapes=LLAMA_NAMES.compute_shapes,
)
