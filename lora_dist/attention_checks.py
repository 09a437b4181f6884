"""What attention, and what stands in its place, can have together in a base model; standard library only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_dist.refusals import require

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
_ONLY_WITH_SPARSE_ATTENTION: dict[str, object] = {
    **{"attended_positions": None, "indexer_heads": None, "indexer_head_size": None, "layers_without_indexer": []},
    "stages_begin_at_indexers": False,
}
DELTA_SIZES = ("delta_key_heads", "delta_value_heads", "delta_key_size", "delta_value_size", "delta_kernel_size")


def check_attention(model: "ModelConfig") -> None:
    """ValueError, with the value and the remedy."""
    _check_sinks(model)
    _check_windows(model)
    _check_heads(model)
    _check_latents(model)
    _check_indexers(model)
    _check_delta_nets(model)
    if model.architecture.rotary:
        _check_rotary(model)


def check_left_out(model: "ModelConfig", plain_values: Mapping[str, object]) -> None:
    """ValueError for a key that says anything but its plain value."""
    for key, plain in plain_values.items():
        shown = "null" if plain is None else plain
        require(
            getattr(model, key) == plain,
            f"model.{key}={getattr(model, key)}: {model.family} has none of it; leave it {shown}",
        )


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


def _check_windows(model: "ModelConfig") -> None:
    require(
        model.sliding_window is None or model.architecture.windows,
        f"model.sliding_window={model.sliding_window}: {model.family} sees all positions before; leave it null",
    )
    for key in ("full_attention_layers", "local_rope_theta"):
        names_kinds = key == "full_attention_layers" and model.architecture.delta_layers
        require(
            not getattr(model, key) or model.sliding_window is not None or names_kinds,
            f"model.{key}={getattr(model, key)} has no meaning without model.sliding_window",
        )
    require(
        not model.unturned_layers or model.architecture.unturned_layers,
        f"model.unturned_layers={model.unturned_layers}: positions turn all layers of {model.family}; leave it empty",
    )
    for key in ("full_attention_layers", "unturned_layers"):
        for layer in getattr(model, key):
            require(
                0 <= layer < model.num_layers,
                f"model.{key}: there is no layer {layer} of {model.num_layers}",
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
        f"model.value_head_size={model.value_head_size} exceeds model.head_size={model.head_size}, and the fused"
        f" attention kernels want both alike, for which values alone are padded here; use at most {model.head_size}",
    )
    require(
        model.attention_scale is None or model.rope_scaling.get("factor", 1.0) > 1,
        f"model.attention_scale={model.attention_scale}: {model.family} has it with a longer context alone, that is"
        " with a factor above 1 in model.rope_scaling; leave it null",
    )


def _check_indexers(model: "ModelConfig") -> None:
    if not model.architecture.sparse_attention:
        check_left_out(model, _ONLY_WITH_SPARSE_ATTENTION)
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


def _check_delta_nets(model: "ModelConfig") -> None:
    if not model.architecture.delta_layers:
        check_left_out(model, dict.fromkeys(DELTA_SIZES))
        return
    for key in DELTA_SIZES:
        require(getattr(model, key) is not None, f"model.family={model.family} needs model.{key}")
    require(
        model.delta_value_heads % model.delta_key_heads == 0,  # type: ignore[operator]
        f"model.delta_key_heads={model.delta_key_heads} does not divide"
        f" model.delta_value_heads={model.delta_value_heads}",
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
    require(
        model.query_growth == 0 or model.architecture.growing_queries,
        f"model.query_growth={model.query_growth}: {model.family} has none of it; leave it 0",
    )
    require(
        model.query_growth >= 0 and (model.query_growth == 0 or "beta_fast" in model.rope_scaling),
        f"model.query_growth={model.query_growth} must be at least 0, and above it needs YaRN's model.rope_scaling",
    )
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
    for key in ("factor", "original_max_position_embeddings"):
        value = model.rope_scaling.get(key, 1.0)
        require(value > 0, f"model.rope_scaling: {key}={value} must be positive")
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
