"""Hugging Face's Seed-OSS: config.json read and written, its tensors named as Llama's; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, get_number
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_positions, read_sizes
from lora_dist.model_config import ModelConfig

_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (True, (True,)),
    "attention_out_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
}
_ABSENT: dict[str, Any] = {
    **{"num_key_value_heads": 8, "head_dim": 128, "attention_dropout": 0.1, "residual_dropout": 0.1},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`residual_dropout` is on what attention and the MLP give, and not on the embedding."""
    config = _ABSENT | dict(config)
    return {
        "family": "seed_oss",
        **read_sizes(config, path),
        **read_positions(config, path),
        "hidden_dropout": get_number(config, "residual_dropout", 0.1, path),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "attention_bias": True,
        "attention_out_bias": False,
        "residual_dropout": model.hidden_dropout,
    }


SEED_OSS_FAMILY = HfFamily(
    architecture="SeedOssForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=LLAMA_NAMES.find_parts,
    compute_shapes=LLAMA_NAMES.compute_shapes,
)
