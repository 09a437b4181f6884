"""Hugging Face's OPT: tensor names, and config.json read and written; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import TIED_HEAD, HfFamily, LayerNames, get_number, get_size
from lora_dist.model_config import ModelConfig

OPT_NAMES = LayerNames(
    layers="model.decoder.layers.{layer}.",
    modules={
        "input_layernorm": "self_attn_layer_norm",
        "self_attention.linear_qkv": {
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
        },
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "final_layer_norm",
        "mlp.linear_fc1": "fc1",
        "mlp.linear_fc2": "fc2",
    },
    others={
        "embedding.word_embeddings.weight": "model.decoder.embed_tokens.weight",
        "embedding.position_embeddings.weight": "model.decoder.embed_positions.weight",
        "output_layer.weight": TIED_HEAD,
        "decoder.final_layernorm.weight": "model.decoder.final_layer_norm.weight",
        "decoder.final_layernorm.bias": "model.decoder.final_layer_norm.bias",
    },
)
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "activation_function": ("relu", ("relu",)),
    "do_layer_norm_before": (True, (True,)),
    "_remove_final_layer_norm": (False, (False,)),
    "enable_bias": (True, (True,)),
    "layer_norm_elementwise_affine": (True, (True,)),
}


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hidden_size = get_size(config, "hidden_size", path)
    projected = config.get("word_embed_proj_dim", hidden_size)
    if projected != hidden_size:
        raise ValueError(
            f"{path}: word_embed_proj_dim={projected} differs from hidden_size={hidden_size}, which is not supported;"
            " name an OPT without projected embeddings (all but 350M)"
        )
    return {
        "family": "opt",
        "num_layers": get_size(config, "num_hidden_layers", path),
        "hidden_size": hidden_size,
        "num_heads": get_size(config, "num_attention_heads", path),
        "ffn_hidden_size": get_size(config, "ffn_dim", path),
        "vocab_size": get_size(config, "vocab_size", path),
        "max_position_embeddings": get_size(config, "max_position_embeddings", path),
        "layernorm_epsilon": 1e-5,
        "tied_output": bool(config.get("tie_word_embeddings", True)),
        "hidden_dropout": get_number(config, "dropout", 0.1, path),
        "attention_dropout": get_number(config, "attention_dropout", 0.0, path),
        "init_std": get_number(config, "init_std", 0.02, path),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "word_embed_proj_dim": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "ffn_dim": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tied_output,
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_std": model.init_std,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    }


OPT_FAMILY = HfFamily(
    architecture="OPTForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=OPT_NAMES.find_parts,
    compute_shapes=OPT_NAMES.compute_shapes,
    embedding="model.decoder.embed_tokens.weight",
)
