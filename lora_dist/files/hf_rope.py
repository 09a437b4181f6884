"""Rotary positions in config.json: `rope_parameters` since transformers 5, before that `rope_theta` and
`rope_scaling`; read and written, pure.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_dist.attention_checks import NOT_ROUNDED, ROPE_SCALINGS
from lora_dist.files.hf_layout import get_number, get_size
from lora_dist.model_config import ModelConfig

_ORIGINAL = "original_max_position_embeddings"
_THETA = 10000.0


def read_rope(config: Mapping[str, Any], path: Path, kinds: Collection[str]) -> dict[str, Any]:
    """ModelConfig's rotary fields, the share of a head that is turned apart. ValueError for a rule not in `kinds`."""
    rope = get_rope(config, path)
    kind = rope["rope_type"]
    if kind not in kinds:
        raise ValueError(f"{path}: rope type {kind!r} is not supported, only {', '.join(kinds)}")
    if kind in _COMPLETE:
        rope = _COMPLETE[kind](rope, config, path)
    missing = [key for key in sorted(ROPE_SCALINGS[kind]) if not isinstance(rope.get(key), int | float)]
    if missing:
        raise ValueError(f"{path}: rope type {kind!r} has no number {missing[0]}")
    is_rounded = kind != "yarn" or rope["truncate"]
    return {
        "rope_theta": float(get_number(rope if rope.get("rope_theta") else config, "rope_theta", _THETA, path)),
        "rope_scaling": {key: float(rope[key]) for key in sorted(ROPE_SCALINGS[kind])}
        | ({} if is_rounded else NOT_ROUNDED),
        "rope_divisors": [float(divisor) for divisor in rope["short_factor"]] if kind == "longrope" else [],
    }


def get_rope(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The rule's settings, always with its `rope_type`. ValueError where config.json has no object there, or two rules:
    transformers would take rope_scaling, and with it not even the base of rope_parameters.
    """
    stored = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    for rule in stored:
        if not isinstance(rule, dict):
            raise ValueError(f"{path}: rope_parameters (or rope_scaling) is {rule!r}, no JSON object")
    rules = [rule for rule in stored if rule]
    if len(rules) == 2 and _complete(rules[0], config) != _complete(rules[1], config):
        raise ValueError(
            f"{path}: rope_parameters={rules[0]} and rope_scaling={rules[1]} are two rules;"
            " move what is meant into rope_parameters and leave rope_scaling out"
        )
    return _name_kind(rules[0] if rules else {})


def _name_kind(rule: Mapping[str, Any]) -> dict[str, Any]:
    kind = rule.get("rope_type", rule.get("type", "default"))
    return {**rule, "rope_type": "longrope" if kind == "su" else kind}  # Phi-3's first name of it


def _complete(rule: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With what transformers takes from the rest of config.json, and writes into rope_parameters when it saves."""
    known = {key: value for key, value in _name_kind(rule).items() if value is not None and key != "type"}
    return {
        "rope_theta": config.get("rope_theta") or _THETA,
        "partial_rotary_factor": config.get("partial_rotary_factor") or 1.0,
        _ORIGINAL: config.get(_ORIGINAL) or config.get("max_position_embeddings"),
        **known,
    }


def _complete_yarn(rope: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What transformers takes where nothing is said (YaRN, arXiv:2309.00071, sections 3.2 and 3.4)."""
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{path}: rope type 'yarn' with truncate={truncate!r}, which is neither true nor false")
    original, factor = find_original(config, path), find_factor(rope, config, path)
    mscale, all_dims = (get_number(rope, key, 0.0, path) for key in ("mscale", "mscale_all_dim"))
    sharper = compute_mscale(factor, 1.0)
    if mscale and all_dims:
        sharper = compute_mscale(factor, mscale) / compute_mscale(factor, all_dims)
    return {
        **rope,
        "truncate": truncate,
        "factor": factor,
        _ORIGINAL: original,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "attention_factor": sharper if rope.get("attention_factor") is None else rope["attention_factor"],
    }


def compute_mscale(factor: float, weight: float) -> float:
    """By how much cosines and sines, or queries and keys, grow in a context `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _complete_longrope(rope: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The frequencies' short factors, which hold up to the original context, and its attention factor (LongRoPE,
    arXiv:2402.13753; the default as transformers has it).
    """
    if not isinstance(rope.get("short_factor"), list):
        raise ValueError(f"{path}: rope type 'longrope' has no list short_factor")
    original, factor = find_original(config, path), find_factor(rope, config, path)
    sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**rope, "attention_factor": sharper if rope.get("attention_factor") is None else rope["attention_factor"]}


_COMPLETE = {"yarn": _complete_yarn, "longrope": _complete_longrope}


def find_factor(rope: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> float:
    """How many times longer the context has become."""
    longer = get_size(config, "max_position_embeddings", path) / find_original(config, path)
    return get_number(rope, "factor", longer, path)


def find_original(config: Mapping[str, Any], path: Path) -> int:
    """Positions that the model was first trained with."""
    original = config.get(_ORIGINAL) or get_rope(config, path).get(_ORIGINAL) or config.get("max_position_embeddings")
    return get_size({_ORIGINAL: original}, _ORIGINAL, path)


def describe_rope(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`; the inverse of `read_rope` but for LongRoPE, whose factors beyond its context are not kept."""
    rounds = "truncate" not in model.rope_scaling
    keys = set(model.rope_scaling) - NOT_ROUNDED.keys()
    kind = next(kind for kind, its_keys in ROPE_SCALINGS.items() if its_keys == keys)
    assert kind != "longrope", "such a model comes from a checkpoint, whose config.json is kept"
    scaling = {key: int(value) if key == _ORIGINAL else value for key, value in model.rope_scaling.items()}
    scaling |= {} if rounds else {"truncate": False}
    return {"rope_type": kind, "rope_theta": model.rope_theta, **scaling}  # the original context as an integer
