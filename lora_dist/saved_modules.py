"""Whole modules of the base that train beside the adapters, by the names that transformers gives them; pure."""

import re
from collections.abc import Sequence

from lora_dist.lora_config import LoraConfig
from lora_dist.model_config import ModelConfig
from lora_dist.refusals import require, require_one_of

_EMBEDDING, _HEAD, _FINAL_NORM = "embedding.word_embeddings", "output_layer", "decoder.final_layernorm"
_POSITIONS = "embedding.position_embeddings"
_INPUT_NORM, _MLP_NORM = "decoder.layers.*.input_layernorm", "decoder.layers.*.pre_mlp_layernorm"
_Q_NORM, _K_NORM = "decoder.layers.*.self_attention.q_layernorm", "decoder.layers.*.self_attention.k_layernorm"
_WHOLE_Q_NORM, _WHOLE_K_NORM = (f"decoder.layers.*.self_attention.layernorm_{name}" for name in "qk")
_ATTENTION_OUTPUT_NORM = "decoder.layers.*.self_attention.output_layernorm"
_MLP_OUTPUT_NORM = "decoder.layers.*.mlp.output_layernorm"
_Q_LATENT_NORM = "decoder.layers.*.self_attention.q_latent_layernorm"
_KV_LATENT_NORM = "decoder.layers.*.self_attention.kv_latent_layernorm"

_LLAMA: dict[str, tuple[str, ...]] = {
    "embed_tokens": (_EMBEDDING,),
    "lm_head": (_HEAD,),
    "input_layernorm": (_INPUT_NORM,),
    "post_attention_layernorm": (_MLP_NORM,),
    "norm": (_FINAL_NORM,),
}
_OLMO: dict[str, tuple[str, ...]] = {
    "embed_tokens": (_EMBEDDING,),
    "lm_head": (_HEAD,),
    "post_attention_layernorm": (_ATTENTION_OUTPUT_NORM,),
    "post_feedforward_layernorm": (_MLP_OUTPUT_NORM,),
    "norm": (_FINAL_NORM,),
    "q_norm": (_WHOLE_Q_NORM,),
    "k_norm": (_WHOLE_K_NORM,),
}
_MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "wte": (_EMBEDDING,),
        "wpe": (_POSITIONS,),
        "ln_1": (_INPUT_NORM,),
        "ln_2": (_MLP_NORM,),
        "ln_f": (_FINAL_NORM,),
    },
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "gpt_oss", "phi3"), _LLAMA),
    **dict.fromkeys(("granite", "seed_oss", "ministral3", "smollm3"), _LLAMA),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "glm4_moe"),
        _LLAMA | {"q_norm": (_Q_NORM,), "k_norm": (_K_NORM,)},
    ),
    "minimax_m2": _LLAMA | {"q_norm": (_WHOLE_Q_NORM,), "k_norm": (_WHOLE_K_NORM,)},
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO),
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm_moe_dsa"),
        _LLAMA | {"q_a_layernorm": (_Q_LATENT_NORM,), "kv_a_layernorm": (_KV_LATENT_NORM,)},
    ),
    "gemma3_text": _LLAMA
    | {
        "post_attention_layernorm": (_ATTENTION_OUTPUT_NORM,),
        "pre_feedforward_layernorm": (_MLP_NORM,),
        "post_feedforward_layernorm": (_MLP_OUTPUT_NORM,),
        "q_norm": (_Q_NORM,),
        "k_norm": (_K_NORM,),
    },
    "opt": {
        "embed_tokens": (_EMBEDDING,),
        "embed_positions": (_POSITIONS,),
        "lm_head": (_HEAD,),
        "self_attn_layer_norm": (_INPUT_NORM,),
        "final_layer_norm": (_MLP_NORM, _FINAL_NORM),  # transformers' name for both
    },
    "gpt_neox": {
        "embed_in": (_EMBEDDING,),
        "lm_head": (_HEAD,),
        "input_layernorm": (_INPUT_NORM,),
        "post_attention_layernorm": (_MLP_NORM,),
        "final_layer_norm": (_FINAL_NORM,),
    },
}
"""Canonical modules by family and name; `*` is any layer."""


def list_saved_modules(model: ModelConfig) -> list[str]:
    """What lora.modules_to_save can name. A tied output layer is the embedding, so it has no name of its own."""
    absent = {_HEAD} if model.tied_output else set()
    absent |= set() if model.has_qk_norm else {_Q_NORM, _K_NORM}
    absent |= set() if model.query_latent_size is not None else {_Q_LATENT_NORM}
    return [name for name, modules in _MODULES[model.family].items() if not absent & set(modules)]


def find_embedding_name(model: ModelConfig) -> str:
    """`wte`, `embed_tokens`: with it a tied output layer trains."""
    return next(name for name, modules in _MODULES[model.family].items() if _EMBEDDING in modules)


def is_saved(canonical_name: str, modules: Sequence[str], model: ModelConfig) -> bool:
    """Whether a base parameter belongs to one of `modules`, names of `list_saved_modules`."""
    module = re.sub(r"\.layers\.\d+\.", ".layers.*.", canonical_name.rpartition(".")[0])
    return any(module in _MODULES[model.family][name] for name in modules)


def check_saved_modules(key: str, modules: Sequence[str], model: ModelConfig) -> None:
    """ValueError for a module that this model has not."""
    for module in modules:
        require_one_of(key, module, tuple(list_saved_modules(model)))


def find_norms(modules: Sequence[str], model: ModelConfig) -> list[str]:
    """Those of `modules` that are norms with biases."""
    if model.architecture.rms_norm:
        return []
    return [name for name in modules if any("layernorm" in part for part in _MODULES[model.family][name])]


def check_trained_base(lora: LoraConfig, model: ModelConfig) -> None:
    """ValueError for modules that this model has not, or a bias that would train twice."""
    check_saved_modules("lora.modules_to_save", lora.modules_to_save, model)
    require(
        not (lora.bias == "all" and find_norms(lora.modules_to_save, model)),
        f"lora.bias=all trains the norms' biases, lora.modules_to_save={lora.modules_to_save} the norms whole;"
        " use lora.bias=lora_only or none",
    )
