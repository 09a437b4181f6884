"""The families of family_models whose attention comes out of latents."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    PreTrainedModel,
)

ATTENDED = 32
"""Positions that the indexers pick: half of those that a model has."""
_LATENT = {"num_key_value_heads": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
_INDEXER = {"index_topk": ATTENDED, "index_n_heads": 16, "index_head_dim": 8}
"""So many heads that none has a score above zero for hardly any position: of equal scores any may be picked."""
_PICKED = {
    **{"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.7},
}


def list_latent_families(sizes: Mapping[str, Any], yarn: Mapping[str, Any]) -> dict[str, Callable[[], PreTrainedModel]]:
    """Name -> a model of that family, of these sizes and this rotary rule."""
    sizes = {**sizes, **_LATENT}
    scaled = {**yarn, "mscale": 1.0, "mscale_all_dim": 0.7}
    return {
        "deepseek_v3": lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(**sizes, **_PICKED, q_lora_rank=20, rope_parameters=dict(scaled))
        ),
        "deepseek_v3_direct": lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **sizes,
                q_lora_rank=None,
                moe_intermediate_size=24,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_shared_experts=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=2,
                rope_interleave=False,
                rms_norm_eps=1e-3,  # which the latents' norms do not have
            )
        ),
        "deepseek_v32": lambda: DeepseekV32ForCausalLM(
            DeepseekV32Config(**sizes, **_PICKED, **_INDEXER, q_lora_rank=20, rope_parameters=dict(scaled))
        ),
        "glm_moe_dsa": lambda: GlmMoeDsaForCausalLM(
            GlmMoeDsaConfig(
                **{**sizes, "v_head_dim": 10},
                **_INDEXER,
                q_lora_rank=20,
                moe_intermediate_size=16,
                n_routed_experts=6,
                num_experts_per_tok=3,
                first_k_dense_replace=2,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                indexer_types=["full", "shared", "full", "shared"],
            )
        ),
    }
