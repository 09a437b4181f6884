"""What sizes and settings a base model can have together; standard library only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_dist.architecture import ARCHITECTURES
from lora_dist.base_format import BASE_FORMATS
from lora_dist.refusals import require, require_one_of

if TYPE_CHECKING:
    from lora_dist.model_config import ModelConfig

ROPE_SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor"}),
    "longrope": frozenset({"attention_factor"}),
}
"""Keys of model.rope_scaling by what transformers calls the rule; YaRN's may be beside NOT_ROUNDED."""
NOT_ROUNDED = {"truncate": 0.0}
_KERNEL_MULTIPLE = 8
"""Of a head's features, in torch's fused attention on GPUs."""
_ONLY_WITH_SHARED_EXPERTS: dict[str, object] = {
    **{"shared_ffn_size": None, "num_dense_layers": 0, "dense_ffn_size": None},
    **{"expert_weight_scale": 1.0, "num_expert_groups": 1, "groups_per_token": 1},
}
_ONLY_WITH_SPARSE_ATTENTION: dict[str, object] = {
    **{"attended_positions": None, "indexer_heads": None, "indexer_head_size": None, "layers_without_indexer": []},
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
    _check_experts(model)
    require(
        model.wrapper is None or model.checkpoint is not None,
        f"model.wrapper={model.wrapper} is of a model.checkpoint; without one leave it null",
    )
    _check_gate(model)
    _check_sinks(model)
    _check_windows(model)
    _check_heads(model)
    _check_latents(model)
    _check_indexers(model)
    if model.architecture.rotary:
        _check_rotary(model)


def _check_experts(model: "ModelConfig") -> None:
    num_experts, num_picked = model.num_experts, model.experts_per_token
    if not model.architecture.shared_expert:
        _check_left_out(model, _ONLY_WITH_SHARED_EXPERTS)
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


def _check_sinks(model: "ModelConfig") -> None:
    if not model.architecture.attention_sinks:
        return
    require(
        model.head_dim % _KERNEL_MULTIPLE == 0,
        f"model.head_size={model.head_dim} of {model.family} must be a multiple of {_KERNEL_MULTIPLE}, which is what"
        " attention's fused kernels take",
    )
    require(
        model.attention_dropout == 0,
        f"model.attention_dropout={model.attention_dropout}: attention with sinks, of {model.family}, is computed"
        " without dropout; set it to 0",
    )


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


def _check_windows(model: "ModelConfig") -> None:
    require(
        model.sliding_window is None or model.architecture.windows,
        f"model.sliding_window={model.sliding_window}: {model.family} sees all positions before; leave it null",
    )
    for key in ("full_attention_layers", "local_rope_theta"):
        require(
            not getattr(model, key) or model.sliding_window is not None,
            f"model.{key}={getattr(model, key)} has no meaning without model.sliding_window",
        )
    for layer in model.full_attention_layers:
        require(
            0 <= layer < model.num_layers,
            f"model.full_attention_layers: there is no layer {layer} of {model.num_layers}",
        )
    for key in ("local_rope_theta", "attention_scale"):
        value = getattr(model, key)
        require(value is None or value > 0, f"model.{key}={value} must be positive")


def _check_heads(model: "ModelConfig") -> None:
    require(
        model.head_size is not None or model.hidden_size % model.num_heads == 0,
        f"model.num_heads={model.num_heads} does not divide model.hidden_size={model.hidden_size}",
    )
    require(
        model.num_heads % model.num_query_groups == 0,
        f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}",
    )

    require(
        model.architecture.grouped_query or model.num_query_groups == model.num_heads,
        f"model.num_kv_heads={model.num_kv_heads} differs from model.num_heads={model.num_heads}, and"
        f" model.family={model.family} has as many of both; leave it null",
    )


def _check_latents(model: "ModelConfig") -> None:
    if not model.architecture.latent_attention:
        for key in ("query_latent_size", "kv_latent_size", "rope_head_size", "value_head_size", "rope_interleaved"):
            value = getattr(model, key)
            plain = "false" if key == "rope_interleaved" else "null"
            require(not value, f"model.{key}={value}: {model.family} has none of it; leave it {plain}")
        return
    for key in ("kv_latent_size", "rope_head_size", "value_head_size"):
        require(getattr(model, key) is not None, f"model.family={model.family} needs model.{key}")
    require(
        model.rotary_size < model.head_dim,
        f"model.rope_head_size={model.rope_head_size} leaves none of model.head_size={model.head_size} unturned",
    )
    require(
        model.value_dim <= model.head_dim,
        f"model.value_head_size={model.value_head_size} exceeds model.head_size={model.head_size}",
    )
    require(
        model.attention_scale is None or model.rope_scaling.get("factor", 1.0) > 1,
        f"model.attention_scale={model.attention_scale}: {model.family} has it with a longer context alone, that is"
        " with a factor above 1 in model.rope_scaling; leave it null",
    )


def _check_indexers(model: "ModelConfig") -> None:
    if not model.architecture.sparse_attention:
        _check_left_out(model, _ONLY_WITH_SPARSE_ATTENTION)
        return
    for key in ("query_latent_size", "attended_positions", "indexer_heads", "indexer_head_size"):
        require(getattr(model, key) is not None, f"model.family={model.family} needs model.{key}")
    require(model.rope_interleaved, f"model.rope_interleaved=false: {model.family} turns neighbours; set it true")
    require(
        model.rotary_size <= (model.indexer_head_size or 0),
        f"model.indexer_head_size={model.indexer_head_size} is below model.rope_head_size={model.rotary_size}, the"
        " features that positions turn there too",
    )
    for layer in model.layers_without_indexer:
        require(
            0 < layer < model.num_layers,
            f"model.layers_without_indexer: layer {layer} of {model.num_layers} is not there, or is the first, before"
            " which there is no indexer",
        )


def _check_left_out(model: "ModelConfig", plain_values: Mapping[str, object]) -> None:
    for key, plain in plain_values.items():
        shown = "null" if plain is None else plain
        require(
            getattr(model, key) == plain,
            f"model.{key}={getattr(model, key)}: {model.family} has none of it; leave it {shown}",
        )


def _check_rotary(model: "ModelConfig") -> None:
    require(
        0 < model.rotary_fraction <= 1, f"model.rotary_fraction={model.rotary_fraction} must lie above 0, and up to 1"
    )
    require(
        model.rotary_fraction == 1 or model.architecture.partial_rotary,
        f"model.rotary_fraction={model.rotary_fraction}: {model.family} turns whole heads; leave it 1",
    )
    require(
        model.rotary_size % 2 == 0 and model.rotary_size > 0,
        f"model.head_size={model.head_dim} must be even for rotary positions, and so must the"
        f" {model.rotary_size} of its features that model.rotary_fraction={model.rotary_fraction} turns",
    )
    require(model.rope_theta > 0, f"model.rope_theta={model.rope_theta} must be positive")
    ways = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys in ROPE_SCALINGS.values())
    truncate = model.rope_scaling.get("truncate", 0.0)
    require(
        truncate == 0,
        f"model.rope_scaling: truncate={truncate} can be 0 alone; leave it out where YaRN's ramp is rounded",
    )
    keys = set(model.rope_scaling) - NOT_ROUNDED.keys()
    require(
        keys in ROPE_SCALINGS.values() and (keys == ROPE_SCALINGS["yarn"] or keys == set(model.rope_scaling)),
        f"model.rope_scaling has {', '.join(sorted(model.rope_scaling))}; it takes {ways}",
    )
    if set(model.rope_scaling) == ROPE_SCALINGS["longrope"] or model.rope_divisors:
        _check_longrope(model)


def _check_longrope(model: "ModelConfig") -> None:
    require(
        set(model.rope_scaling) == ROPE_SCALINGS["longrope"] and model.checkpoint is not None,
        "model.rope_divisors are LongRoPE's, with model.rope_scaling={attention_factor} and a model.checkpoint:"
        " without them leave it empty",
    )
    require(
        len(model.rope_divisors) == model.rotary_size // 2 and all(divisor > 0 for divisor in model.rope_divisors),
        f"model.rope_divisors={model.rope_divisors}: LongRoPE takes a positive number for each of the"
        f" {model.rotary_size // 2} frequencies",
    )
