"""What sizes and settings a base model can have together; standard library only."""

from typing import TYPE_CHECKING

from lora_dist.architecture import ARCHITECTURES, IN_OUT, OUT_IN
from lora_dist.attention_checks import DELTA_SIZES, check_attention, check_left_out
from lora_dist.base_format import BASE_FORMATS
from lora_dist.refusals import require, require_one_of

if TYPE_CHECKING:
    from lora_dist.model_config import ModelConfig

_ONLY_WITH_SIGMOID_ROUTER: dict[str, object] = {
    **{"num_dense_layers": 0, "dense_ffn_size": None},
    **{"expert_weight_scale": 1.0, "num_expert_groups": 1, "groups_per_token": 1},
}


def check_model(model: "ModelConfig") -> None:
    """ValueError, with the value and the remedy, for sizes and settings that no model has together."""
    require_one_of("model.family", model.family, tuple(ARCHITECTURES))
    require_one_of("model.base_format", model.base_format, BASE_FORMATS)
    require(
        model.base_format != "mxfp4" or model.architecture.experts,
        f"model.base_format=mxfp4 is for the weights of experts, and {model.family} has none; use nf4 or fp8",
    )
    for key in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "query_latent_size",
        "kv_latent_size",
        "rope_head_size",
        "value_head_size",
        "attended_positions",
        "indexer_heads",
        "indexer_head_size",
        *DELTA_SIZES,
        "ffn_hidden_size",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
        "num_experts",
        "experts_per_token",
        "num_expert_groups",
        "groups_per_token",
        "shared_ffn_size",
        "dense_ffn_size",
    ):
        size = getattr(model, key)
        require(size is None or size >= 1, f"model.{key}={size} must be at least 1")
    for key in ("hidden_dropout", "attention_dropout"):
        require(0.0 <= getattr(model, key) < 1.0, f"model.{key}={getattr(model, key)} must lie in [0, 1)")
    if model.activation is not None:
        require(
            not model.architecture.gated,
            f"model.activation={model.activation}: {model.family} has a gate; leave it null",
        )
        require_one_of("model.activation", model.activation, model.architecture.activations)
    require(
        not model.parallel_residual or model.architecture.parallel_residual,
        f"model.parallel_residual={model.parallel_residual}: a layer of {model.family} has the MLP after the"
        " attention; leave it null",
    )
    require(
        model.qk_norm is None or model.architecture.optional_qk_norm,
        f"model.qk_norm={model.qk_norm}: all models of {model.family} are alike in that; leave it null",
    )
    _check_multipliers(model)
    _check_experts(model)
    require(
        model.wrapper is None or model.checkpoint is not None,
        f"model.wrapper={model.wrapper} is of a model.checkpoint; without one leave it null",
    )
    _check_gate(model)
    check_attention(model)


def _check_multipliers(model: "ModelConfig") -> None:
    for key in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
        value = getattr(model, key)
        require(
            model.architecture.multipliers or value == 1.0,
            f"model.{key}={value}: {model.family} has none of it; leave it 1.0",
        )
        require(value > 0, f"model.{key}={value} must be positive")


def _check_experts(model: "ModelConfig") -> None:
    num_experts, num_picked = model.num_experts, model.experts_per_token
    if not model.architecture.shared_expert:
        check_left_out(model, {"shared_ffn_size": None})
    if not (model.architecture.shared_expert and model.architecture.sigmoid_router):
        check_left_out(model, _ONLY_WITH_SIGMOID_ROUTER)
    require(
        not model.architecture.gated_shared_expert or model.shared_ffn_size is not None,
        f"model.family={model.family} needs model.shared_ffn_size",
    )
    if model.stacked_experts is not None:
        require_one_of("model.stacked_experts", model.stacked_experts, (OUT_IN, IN_OUT))
        require(
            model.architecture.experts and model.family != "gpt_oss",
            f"model.stacked_experts={model.stacked_experts}: files of {model.family} are all alike in that; leave it"
            " null",
        )
    if not model.architecture.experts:
        require(
            num_experts is None and num_picked is None,
            f"model.num_experts={num_experts} and experts_per_token={num_picked}: a layer of {model.family} has one"
            " MLP; leave them null",
        )
        return
    require(
        num_experts is not None and num_picked is not None,
        f"model.family={model.family} needs model.num_experts and model.experts_per_token",
    )
    require(
        num_picked <= num_experts,  # type: ignore[operator]
        f"model.experts_per_token={num_picked} exceeds model.num_experts={num_experts}",
    )
    require(model.expert_weight_scale > 0, f"model.expert_weight_scale={model.expert_weight_scale} must be positive")
    _check_groups(model)
    require(
        0 <= model.num_dense_layers < model.num_layers,
        f"model.num_dense_layers={model.num_dense_layers} leaves none of {model.num_layers} layers to experts",
    )
    require(
        (model.num_dense_layers > 0) == (model.dense_ffn_size is not None),
        f"model.num_dense_layers={model.num_dense_layers} and dense_ffn_size={model.dense_ffn_size}: give both or"
        " neither",
    )


def _check_gate(model: "ModelConfig") -> None:
    for key in ("swiglu_alpha", "swiglu_limit"):
        value = getattr(model, key)
        if model.architecture.bounded_gate:
            require(value is not None and value > 0, f"model.family={model.family} needs a positive model.{key}")
        else:
            require(value is None, f"model.{key}={value}: {model.family} has none of it; leave it null")


def _check_groups(model: "ModelConfig") -> None:
    num_groups, num_picked = model.num_expert_groups, model.groups_per_token
    assert model.num_experts is not None
    assert model.experts_per_token is not None
    require(
        num_picked <= num_groups and model.num_experts % num_groups == 0,
        f"model.groups_per_token={num_picked} of model.num_expert_groups={num_groups}: they must be groups of equal"
        f" size of model.num_experts={model.num_experts}",
    )
    size = model.num_experts // num_groups
    require(
        num_groups == 1 or (size >= 2 and num_picked * size >= model.experts_per_token),
        f"model.num_expert_groups={num_groups} of {size} experts: a group needs two or more, and"
        f" {num_picked} groups model.experts_per_token={model.experts_per_token}",
    )
