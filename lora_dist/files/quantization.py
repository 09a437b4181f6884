"""What config.json says of weights published in fp8 or int4: how many of a weight's values share a scale; pure.

quant_method fp8 (blocks, as DeepSeek-V3; one scale a tensor, as AutoFP8 and Mistral), fbgemm_fp8 (one a row,
Llama-3.1-405B-FP8) and compressed-tensors (llm-compressor's; either of the three, or int4 in groups of a row's, as Kimi
K2 Thinking). Which weights, the files say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUANTIZATION, CONVERT = "quantization_config", "convert the weights to bf16 first"
CODES_PER_WORD = 8
"""Of int4, in 32 bits."""

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None is all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """What weights may be stored as; several where groups of weights differ, none where only the cache is quantised."""

    fp8: tuple[Block, ...] = ()
    int4: tuple[int, ...] = ()
    """Neighbours in a row that share a scale."""


_ROW: Block = (1, None)
_TENSOR: Block = (None, None)
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_Settings = dict[str, tuple[object, tuple[object, ...]]]
"""Key: what it means where it is absent, and the values that are read."""

_METHODS: dict[str, _Settings] = {
    "fp8": {
        "fmt": ("e4m3", ("e4m3", "float8_e4m3fn", None)),
        "activation_scheme": ("dynamic", ("dynamic", "static")),
        "expert_dtype": ("fp8", ("fp8",)),
        "scale_fmt": ("float", ("float", "ue8m0")),
    },
    "fbgemm_fp8": {},
    "compressed-tensors": {
        "transform_config": (None, (None, {})),
        "moe_sparsity_config": (None, (None, {})),
    },
}
_SPARSITY: _Settings = {"format": ("dense", ("dense",))}
_WEIGHTS: _Settings = {"symmetric": (True, (True,)), "dynamic": (False, (False,))}
_FP8: _Settings = {
    **{"num_bits": (8, (8,)), "type": ("int", ("float",)), **_WEIGHTS},
    "strategy": (None, ("tensor", "channel", "block")),
}
_INT4: _Settings = {
    **{"num_bits": (8, (4,)), "type": ("int", ("int",)), **_WEIGHTS},
    **{"strategy": (None, ("group",)), "actorder": (None, (None, False, "weight", "static"))},
}
_FORMATS = {"float-quantized": _FP8, "naive-quantized": _FP8, "pack-quantized": _INT4}


def read_quantization(config: Mapping[str, Any], path: Path) -> Quantization | None:
    """What its quantization_config allows, None without one. ValueError for other ways to quantise."""
    if config.get(QUANTIZATION) is None:
        _refuse_other_places(config, path)
        return None
    where = f"{path}: {QUANTIZATION}"
    settings = _read_object(config, QUANTIZATION, str(path))
    _check_settings(settings, {"quant_method": (None, tuple(_METHODS))}, where)
    method = settings["quant_method"]
    _check_settings(settings, _METHODS[method], where)
    if method == "compressed-tensors":
        return _read_groups(settings, where)
    if method == "fbgemm_fp8":
        return Quantization(fp8=(_ROW,))
    key = "weight_block_size"
    return Quantization(fp8=(_TENSOR if settings.get(key) is None else _read_size(settings, key, where),))


def _refuse_other_places(config: Mapping[str, Any], path: Path) -> None:
    """Where older tools say it: compressed-tensors until 2024, NVIDIA's Model Optimizer."""
    old_key, other_file = "compression_config", path.with_name("hf_quant_config.json")
    found = path if config.get(old_key) else other_file if other_file.is_file() else None
    if found is not None:
        said = f"{found} has {old_key}" if found == path else f"{found} lies"
        raise ValueError(f"{said} in the place of a {QUANTIZATION} in {path.name}, which is not supported; {CONVERT}")


def _read_groups(settings: Mapping[str, Any], where: str) -> Quantization:
    if settings.get("sparsity_config"):
        _check_settings(_read_object(settings, "sparsity_config", where), _SPARSITY, f"{where}'s sparsity_config")
    groups, fp8, int4 = _read_object(settings, "config_groups", where), [], []
    for name in groups:
        group, place = _read_object(groups, name, where), f"{where}'s {name}"
        if group.get("weights") is None:
            continue
        weights, how = _read_object(group, "weights", place), str(group.get("format") or settings.get("format"))
        _check_settings({"format": how}, {"format": (None, tuple(_FORMATS))}, place)
        _check_settings(weights, _FORMATS[how], f"{place}.weights")
        if how == "pack-quantized":
            int4.append(_read_group_size(weights, f"{place}.weights"))
        else:
            fp8.append(_read_block(weights, f"{place}.weights"))
    sizes = {block for block in fp8 if None not in block}
    if len(sizes) > 1:  # the shape of a weight's scales would not tell which of them it has
        known = " and ".join(str(list(size)) for size in sorted(sizes))
        raise ValueError(f"{where} with blocks of {known} is not supported, only of one size; {CONVERT}")
    return Quantization(fp8=tuple(dict.fromkeys(fp8)), int4=tuple(dict.fromkeys(int4)))


def _read_block(weights: Mapping[str, Any], where: str) -> Block:
    if weights["strategy"] == "block":
        return _read_size(weights, "block_structure", where)
    return _ROW if weights["strategy"] == "channel" else _TENSOR


def _read_group_size(weights: Mapping[str, Any], where: str) -> int:
    size = weights.get("group_size")
    if type(size) is not int or size <= 0 or size % CODES_PER_WORD:
        raise ValueError(
            f"{where} with group_size={size!r} is not supported, only a multiple of {CODES_PER_WORD}; {CONVERT}"
        )
    return size


def _read_size(settings: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    size = settings.get(key)
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        raise ValueError(
            f"{where} with {key}={size!r} is not supported, only rows and columns of a block as [128, 128]; {CONVERT}"
        )
    return size[0], size[1]


def _read_object(found: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = found.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key}={value!r} is no JSON object; {CONVERT}")
    return value


def _check_settings(found: Mapping[str, Any], settings: _Settings, where: str) -> None:
    for key, (default, allowed) in settings.items():
        value = found.get(key, default)
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{where} with {key}={value!r} is not supported, only {known}; {CONVERT}")


def find_original_dtype(config: Mapping[str, Any]) -> str:
    """What the weights were before they were quantised, by its name in safetensors: config.json's dtype, else bf16."""
    return _DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
