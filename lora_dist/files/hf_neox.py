"""Hugging Face's GPT-NeoX (Pythia): tensor names, and config.json read and written; pure.

Its fused projection's rows are laid out head by head, as Megatron's are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, LayerNames, get_number, get_size
from lora_dist.files.hf_rope import get_rope, read_rope
from lora_dist.model_config import ModelConfig

NEOX_NAMES = LayerNames(
    layers="gpt_neox.layers.{layer}.",
    modules={
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    },
    others={
        "embedding.word_embeddings.weight": "gpt_neox.embed_in.weight",
        "output_layer.weight": "embed_out.weight",
        "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
        "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
    },
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("gelu", tuple(_ACTIVATIONS)),
    "use_parallel_residual": (True, (True, False)),
    "attention_bias": (True, (True,)),
    "tie_word_embeddings": (False, (False,)),
}


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    fraction = get_number(config, "rotary_pct", 0.25, path)
    return {
        "family": "gpt_neox",
        "num_layers": get_size(config, "num_hidden_layers", path),
        "hidden_size": get_size(config, "hidden_size", path),
        "num_heads": get_size(config, "num_attention_heads", path),
        "ffn_hidden_size": get_size(config, "intermediate_size", path),
        "vocab_size": get_size(config, "vocab_size", path),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "layernorm_epsilon": get_number(config, "layer_norm_eps", 1e-5, path),
        "tied_output": False,
        "activation": _ACTIVATIONS[config.get("hidden_act", "gelu")],
        **read_rope({"rope_theta": config.get("rotary_emb_base")} | dict(config), path, ("default",)),
        "rotary_fraction": float(get_number(get_rope(config, path), "partial_rotary_factor", fraction, path)),
        "parallel_residual": config.get("use_parallel_residual", True),
        "hidden_dropout": get_number(config, "hidden_dropout", 0.0, path),
        "attention_dropout": get_number(config, "attention_dropout", 0.0, path),
        "init_std": get_number(config, "initializer_range", 0.02, path),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": model.rope_theta,
        "partial_rotary_factor": model.rotary_fraction,
    }
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": False,
        "hidden_act": "gelu" if model.mlp_activation == "gelu" else "gelu_new",
        "rope_parameters": rope,
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": model.rotary_fraction,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "use_parallel_residual": model.has_parallel_residual,
    }


NEOX_FAMILY = HfFamily(
    architecture="GPTNeoXForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=NEOX_NAMES.find_parts,
    compute_shapes=NEOX_NAMES.compute_shapes,
    ignored=re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
    embedding="gpt_neox.embed_in.weight",
    module_names={"embed_out": "lm_head"},
)
