"""Hugging Face's GPT-2: tensor names and layouts against the canonical ones, config.json; pure functions.

Hugging Face stores linears as [in, out] (Conv1D) and q, k, v side by side; Megatron stores [out, in] and lays out
the fused projection's rows head by head.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.config import ModelConfig
from lora_dist.files.hf_layout import HfFamily, HfPart, get_number, get_size

QKV_TARGETS = ("q_proj", "k_proj", "v_proj")
PREFIX = "transformer."

_LAYER_MODULES = {
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
_OTHER_TENSORS = {
    "embedding.word_embeddings.weight": "wte.weight",
    "output_layer.weight": "wte.weight",
    "embedding.position_embeddings.weight": "wpe.weight",
    "decoder.final_layernorm.weight": "ln_f.weight",
    "decoder.final_layernorm.bias": "ln_f.bias",
}


def _compute_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a GPT-2 checkpoint must hold, without prefix, in the order it is written."""
    h, f = model.hidden_size, model.ffn_hidden_size
    linears = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, f), "mlp.c_proj": (f, h)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (model.vocab_size, h)}
    shapes["wpe.weight"] = (model.max_position_embeddings, h)
    for layer in range(model.num_layers):
        for module in _LAYER_MODULES.values():
            weight = linears.get(module, (h,))
            shapes[f"h.{layer}.{module}.weight"] = weight
            shapes[f"h.{layer}.{module}.bias"] = weight[-1:]
    return shapes | {"ln_f.weight": (h,), "ln_f.bias": (h,)}


def _find_parts(canonical_name: str, model: ModelConfig) -> list[HfPart]:
    """`decoder.layers.3.mlp.linear_fc1.weight` -> `h.3.mlp.c_fc.weight`, transposed."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)", canonical_name)
    if found is None:
        return [HfPart(name=_OTHER_TENSORS[canonical_name])]
    layer, module, kind = found.groups()
    name, transposed = f"h.{layer}.{_LAYER_MODULES[module]}.{kind}", kind == "weight" and "linear" in module
    if not module.endswith("linear_qkv"):
        return [HfPart(name=name, transposed=transposed)]
    return [
        HfPart(name=name, target=target, first=index * model.hidden_size, transposed=transposed)
        for index, target in enumerate(QKV_TARGETS)
    ]


_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "add_cross_attention": (False, (False,)),
}


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hidden_size = get_size(config, "n_embd", path)
    return {
        "family": "gpt2",
        "num_layers": get_size(config, "n_layer", path),
        "hidden_size": hidden_size,
        "num_heads": get_size(config, "n_head", path),
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden_size,
        "vocab_size": get_size(config, "vocab_size", path),
        "max_position_embeddings": get_size(config, "n_positions", path),
        "layernorm_epsilon": get_number(config, "layer_norm_epsilon", 1e-5, path),
        "hidden_dropout": get_number(config, "resid_pdrop", 0.1, path),
        "attention_dropout": get_number(config, "attn_pdrop", 0.1, path),
        "init_std": get_number(config, "initializer_range", 0.02, path),
    }


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


GPT2_FAMILY = HfFamily(
    architecture="GPT2LMHeadModel",
    prefix=PREFIX,
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=_find_parts,
    compute_shapes=_compute_shapes,
    ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask
    embedding="wte.weight",
)
