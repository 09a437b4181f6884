"""A tiny model of every supported family, of transformers' own classes."""

from collections.abc import Callable

from latent_toy import list_latent_families
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB_SIZE = 101
"""Divides by no tp_size, and is padded at each."""
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 100,
    "pad_token_id": None,
}
_NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_NEOX_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 32}
_LOCAL = {"rope_type": "default", "rope_theta": 9.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
_GLM = {"head_dim": 8, "attention_bias": True, "rope_parameters": _NEOX_ROPE}
_LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
_GROWING = _YARN | {
    **{"original_max_position_embeddings": 4, "factor": 16.0, "llama_4_scaling_beta": 0.4},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
_MULTIPLIERS = {
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 0.5},
}
_FULL, _WINDOW, _LINEAR_LAYER = "full_attention", "sliding_attention", "linear_attention"
_ROUNDS_LESS = {"rms_norm_eps": 1e-2}
"""Where a head reads next to nothing, its norm would make much of rounding."""
_DELTA = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    "linear_conv_kernel_dim": 4,
}


class _ListedMistralConfig(MinistralConfig):
    """As transformers reads a Mistral's config.json that lists its layers."""

    model_type = "mistral"


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, **_LLAMA3})
    ),
    "llama_tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES | {"num_key_value_heads": 8},
            tie_word_embeddings=True,
            rope_parameters=_LINEAR,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "mistral_listed": lambda: MinistralForCausalLM(
        _ListedMistralConfig(**SIZES, head_dim=4, sliding_window=5, layer_types=[_WINDOW, _FULL, _FULL, _WINDOW])
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=_YARN)),
    "qwen2_windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=5)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES | {"intermediate_size": 80},
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        )
    ),
    "qwen3_moe_shares": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=8,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        )
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES | {"num_key_value_heads": 2},  # fewer than TP ranks
            **_DELTA,
            head_dim=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=3,
            layer_types=[_LINEAR_LAYER, _FULL, _LINEAR_LAYER, _FULL],
            **_ROUNDS_LESS,
        )
    ),
    "qwen3_5_text": lambda: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **SIZES, **_DELTA, **_ROUNDS_LESS, head_dim=16, tie_word_embeddings=True, full_attention_interval=2
        )
    ),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(
            **SIZES,
            **_DELTA,
            **_ROUNDS_LESS,
            head_dim=8,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            layer_types=[_FULL, _LINEAR_LAYER, _LINEAR_LAYER, _FULL],
        )
    ),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SIZES,
            **_GLM,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            use_qk_norm=True,
        )
    ),
    "glm4_moe_flat": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SIZES,
            **_GLM,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            norm_topk_prob=False,
            tie_word_embeddings=True,
        )
    ),
    "minimax_m2": lambda: MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            **SIZES,
            head_dim=8,
            num_local_experts=6,
            num_experts_per_tok=3,
            rms_norm_eps=1e-3,
            rope_parameters=_NEOX_ROPE,
        )
    ),
    "minimax_m2_long": lambda: MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            **SIZES | {"num_key_value_heads": 8},
            head_dim=6,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
            rope_parameters=_YARN,
        )
    ),
    **list_latent_families(SIZES, _YARN),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=5,
            swiglu_limit=1.2,
            rope_parameters={**_YARN, "truncate": False},
        )
    ),
    "gpt_oss_listed": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=3,
            sliding_window=3,
            layer_types=[_FULL, _WINDOW, _WINDOW, _FULL],
            swiglu_alpha=0.8,
            swiglu_limit=2.0,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, tie_word_embeddings=True, rope_parameters=_LINEAR, **_MULTIPLIERS)
    ),
    "granite_untied": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES | {"num_key_value_heads": 8}, attention_multiplier=0.4, logits_scaling=3)
    ),
    "seed_oss": lambda: SeedOssForCausalLM(
        SeedOssConfig(**SIZES, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ),
    "ministral3": lambda: Ministral3ForCausalLM(Ministral3Config(**SIZES, head_dim=8, rope_parameters=_GROWING)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 1], rope_parameters=_YARN)),
    "smollm3_windows": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(
            **SIZES,
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "olmo2": lambda: Olmo2ForCausalLM(
        Olmo2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ),
    "olmo3": lambda: Olmo3ForCausalLM(
        Olmo3Config(
            **SIZES | {"num_key_value_heads": 8},
            sliding_window=5,
            layer_types=[_WINDOW, _FULL, _WINDOW, _FULL],
            tie_word_embeddings=True,
            rope_parameters={_FULL: _YARN, _WINDOW: _LOCAL},
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, partial_rotary_factor=0.5, sliding_window=9)),
    "phi3_long": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, tie_word_embeddings=True, original_max_position_embeddings=48, rope_parameters=_LONG)
    ),
    "gemma3_text": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=5,
            sliding_window_pattern=3,
            query_pre_attn_scalar=6,
            rope_parameters={"full_attention": _LINEAR, "sliding_attention": _LOCAL},
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX_SIZES, rope_parameters=_NEOX_ROPE)),
    "gpt_neox_serial": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_NEOX_SIZES, rope_parameters=_NEOX_ROPE, use_parallel_residual=False)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=64,
            bos_token_id=99,
            eos_token_id=100,
            pad_token_id=None,  # an embedding with a padding token has no gradient there
        )
    ),
}
"""Name -> a model of that family; where there are two, they differ in what a checkpoint may choose."""
_SECOND = (
    *("llama_tied", "mistral_listed", "qwen2_windows", "qwen3_moe_shares", "glm4_moe_flat", "minimax_m2_long"),
    *("deepseek_v3_direct", "gpt_oss_listed", "phi3_long", "gpt_neox_serial", "smollm3_windows"),
    "granite_untied",
)
ONE_EACH = [name for name in FAMILIES if name not in _SECOND]
UNLIKE = (
    *("llama", "granite", "ministral3", "smollm3", "gemma3_text", "qwen3_next", "minimax_m2", "olmo3", "deepseek_v3"),
    *("gpt_oss", "gpt_neox", "opt"),
)
"""Which have the least in common."""
