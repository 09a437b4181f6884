"""Weights published in fp8 with a scale for each block of rows and columns, as DeepSeek-V3's; pure.

Shapes: weight [O, I], its scales [ceil(O / block rows), ceil(I / block columns)]; a value is what is stored times its
block's scale (DeepSeek-V3, arXiv:2412.19437, section 3.3.2, and its published files).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BlockSize = tuple[int, int]
"""Rows and columns of a block."""

QUANTIZATION, _SCALE = "quantization_config", "_scale_inv"
_FP8, _SCALE_DTYPES = "F8_E4M3", ("F32", "BF16", "F8_E8M0")
_CONVERT = "convert the weights to bf16 first"
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "quant_method": (None, ("fp8",)),
    "fmt": ("e4m3", ("e4m3",)),
    "activation_scheme": ("dynamic", ("dynamic",)),
    "expert_dtype": ("fp8", ("fp8",)),
    "scale_fmt": ("float", ("float", "ue8m0")),
}
"""Key: what it means where it is absent, and the values that are read. Which tensors are in fp8, the files say."""


def read_block_size(config: Mapping[str, Any], path: Path) -> BlockSize | None:
    """Of config.json's quantization_config, None where it has none. ValueError for any other way to quantise."""
    settings = config.get(QUANTIZATION)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {QUANTIZATION}={settings!r} is no JSON object; {_CONVERT}")
    for key, (default, allowed) in _SETTINGS.items():
        value = settings.get(key, default)
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: {QUANTIZATION} with {key}={value!r} is not supported, only {known}; {_CONVERT}")
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        raise ValueError(
            f"{path}: {QUANTIZATION} with weight_block_size={size!r} is not supported, only rows and columns of a block"
            f" as [128, 128]; {_CONVERT}"
        )
    return size[0], size[1]


def find_original_dtype(config: Mapping[str, Any]) -> str:
    """What the weights were before they were quantised, by its name in safetensors: config.json's dtype, else bf16."""
    return _DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")


def find_scales(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    files: Mapping[str, Path],
    block_size: BlockSize | None,
) -> dict[str, str]:
    """Weight in fp8 -> its scales, by stored name. ValueError naming tensor and file where the two do not fit."""
    scales = {name.removesuffix(_SCALE): name for name in shapes if name.endswith(_SCALE)}
    weights = {name for name, dtype in dtypes.items() if dtype == _FP8}
    for weight in sorted(weights):
        if block_size is None:
            raise ValueError(
                f"{files[weight]}: {weight} is in fp8, but config.json has no {QUANTIZATION} with weight_block_size;"
                f" copy config.json again, or {_CONVERT}"
            )
        if weight not in scales:
            raise ValueError(f"{files[weight]}: {weight} is in fp8 without scales {weight}{_SCALE}; copy them again")
        _check_scales(weight, scales[weight], shapes, dtypes, files, block_size)
    for weight, scale in scales.items():
        if weight not in weights:
            found = f"is {dtypes[weight]}" if weight in dtypes else "is missing"
            raise ValueError(f"{files[scale]}: {scale} has the scales of a weight in fp8, but {weight} {found}")
    return scales


def _check_scales(
    weight: str,
    scale: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    files: Mapping[str, Path],
    block_size: BlockSize,
) -> None:
    shape = shapes[weight]
    if len(shape) < 2:
        raise ValueError(f"{files[weight]}: {weight} is in fp8 with shape {shape}; only matrices have blocks")
    wanted = (*shape[:-2], *(-(-size // block) for size, block in zip(shape[-2:], block_size, strict=True)))
    if shapes[scale] != wanted:
        raise ValueError(
            f"{files[scale]}: {scale} has shape {shapes[scale]}, but {weight} of {shape} has {wanted} blocks"
            f" of config.json's weight_block_size={list(block_size)}"
        )
    if dtypes[scale] not in _SCALE_DTYPES:
        raise ValueError(f"{files[scale]}: {scale} is {dtypes[scale]}, not one of {', '.join(_SCALE_DTYPES)}")


def find_blocks(start: int, size: int, block: int) -> tuple[int, int]:
    """The first block that `size` rows (or columns) from `start` on lie in, and how many there are."""
    first = start // block
    return first, -(-(start + size) // block) - first


def dequantize_blocks(
    stored: torch.Tensor, scales: torch.Tensor, block_size: BlockSize, offset: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Values in fp32 of a part of a weight [O, I], which begins `offset` rows and columns inside its first block."""
    (rows, columns), (row_offset, column_offset) = block_size, offset
    values = stored.float()
    by_column = scales.float().repeat_interleave(columns, 1)[:, column_offset : column_offset + values.shape[1]]
    for number, scale in enumerate(by_column):  # in place: scales of the weight's own size would be a second copy
        values[max(0, number * rows - row_offset) : (number + 1) * rows - row_offset] *= scale
    return values
