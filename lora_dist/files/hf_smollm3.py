"""Hugging Face's SmolLM3: config.json read and written, its tensors named as Llama's; pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.hf_layout import HfFamily, get_size
from lora_dist.files.hf_llama import (
    LLAMA_NAMES,
    describe_layer_types,
    describe_llama,
    read_full_layers,
    read_positions,
    read_sizes,
)
from lora_dist.model_config import ModelConfig

_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "use_sliding_window": (False, (False, True)),
}
_ABSENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = _ABSENT | dict(config)
    fields = {"family": "smollm3", **read_sizes(config, path), **read_positions(config, path)}
    unturned = _read_unturned(config, path, fields["num_layers"])
    return {**fields, "unturned_layers": unturned, **_read_windows(config, path, unturned)}


def _read_unturned(config: Mapping[str, Any], path: Path, num_layers: int) -> list[int]:
    """Those with a 0 in the list; without one the last of every `no_rope_layer_interval` layers."""
    turned = config.get("no_rope_layers")
    if turned is None:
        interval = get_size(config, "no_rope_layer_interval", path)
        return [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if not isinstance(turned, list) or len(turned) < num_layers or not all(one in (0, 1) for one in turned):
        raise ValueError(
            f"{path}: no_rope_layers={turned!r} is not a list of {num_layers} times 1, a layer with rotary positions,"
            " or 0, one without"
        )
    return [layer for layer in range(num_layers) if not turned[layer]]


def _read_windows(config: Mapping[str, Any], path: Path, unturned: list[int]) -> dict[str, Any]:
    """A window is on the layers that `layer_types` names, without that list on those without rotary positions."""
    num_layers = get_size(config, "num_hidden_layers", path)
    uses_window = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    absent = [layer for layer in range(num_layers) if not (uses_window and layer in unturned)]
    full_layers = read_full_layers(config, path, absent)
    if len(full_layers) == num_layers:
        return {}
    if not uses_window:
        raise ValueError(
            f"{path}: layer_types names layers with a window, but use_sliding_window="
            f"{config.get('use_sliding_window')} and sliding_window={config.get('sliding_window')} give none; set both"
            " or leave layer_types out"
        )
    return {"sliding_window": get_size(config, "sliding_window", path), "full_attention_layers": full_layers}


def _describe(model: ModelConfig) -> dict[str, Any]:
    return {
        **describe_llama(model),
        "no_rope_layers": [int(model.turns(layer)) for layer in range(model.num_layers)],
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": describe_layer_types(model),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the defaults are of SmolLM3's vocabulary
    }


SMOLLM3_FAMILY = HfFamily(
    architecture="SmolLM3ForCausalLM",
    settings=_SETTINGS,
    read_fields=_read_fields,
    describe=_describe,
    find_parts=LLAMA_NAMES.find_parts,
    compute_shapes=LLAMA_NAMES.compute_shapes,
)
