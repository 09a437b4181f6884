"""Hugging Face's Phi-3, Phi-3.5 and Phi-4: tensor names, and config.json read and written; pure.

q, k and v are one linear, gate and up another, the targets' rows one after the other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_llama import LLAMA_NAMES, describe_llama, read_sizes, read_window
from lora_dist.files.hf_rope import describe_rope, find_original, get_rope, read_rope
from lora_dist.model_config import ModelConfig

PHI3_NAMES = LayerNames(
    layers=LLAMA_NAMES.layers,
    modules={
        **LLAMA_NAMES.modules,
        "self_attention.linear_qkv": dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"),
        "mlp.linear_fc1": dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
    },
    others=LLAMA_NAMES.others,
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "embd_pdrop": (0.0, (0.0,)),
    "resid_pdrop": (0.0, (0.0,)),
}


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = {"rms_norm_eps": 1e-5} | dict(config)
    fraction = get_number(config, "partial_rotary_factor", 1.0, path)
    return {
        "family": "phi3",
        **read_sizes(config, path),
        "max_position_embeddings": _read_context(config, path),
        "sliding_window": read_window(config, path),
        "rotary_fraction": float(get_number(get_rope(config, path), "partial_rotary_factor", fraction, path)),
        **read_rope(config, path, ("default", "longrope")),
    }


def _read_context(config: Mapping[str, Any], path: Path) -> int:
    """Positions a row may have: those up to which LongRoPE's short factors hold."""
    context = get_size(config, "max_position_embeddings", path)
    return min(context, find_original(config, path)) if get_rope(config, path)["rope_type"] == "longrope" else context


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "sliding_window": model.sliding_window,
        "rope_parameters": {**describe_rope(model), "partial_rotary_factor": model.rotary_fraction},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the defaults are of Phi-3's vocabulary
    }


PHI3_FAMILY = HfFamily(
    architecture="Phi3ForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=PHI3_NAMES.find_parts,
    compute_shapes=PHI3_NAMES.compute_shapes,
    ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)
