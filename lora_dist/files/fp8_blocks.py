"""Weights published in fp8 with a scale for each block of rows and columns, as DeepSeek-V3's; pure.

Shapes: weight [O, I], its scales [ceil(O / block rows), ceil(I / block columns)]; a value is what is stored times its
block's scale (DeepSeek-V3, arXiv:2412.19437, section 3.3.2, and its published files). A scale a row is one for blocks
of [1, I], and [O, 1] scales; a scale a tensor one for a block of [O, I], stored as a scalar or [1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_dist.files.quantization import CONVERT, QUANTIZATION, Block

BlockSize = tuple[int, int]
"""Rows and columns of a block."""

_SUFFIXES = ("_scale_inv", "_scale")
_ENDINGS = ("_scale_inv", ".weight_scale")
_FP8, SCALE_DTYPES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
_OF_ACTIVATIONS = {"input_scale", "activation_scale", "act_scale", "output_scale"}
_OF_CACHE = {"q_scale", "k_scale", "v_scale", "kv_scale"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScales:
    """Of one weight: the stored name of its scales and the size of its blocks."""

    name: str
    block_size: BlockSize


def find_scales(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    files: Mapping[str, Path],
    blocks: Sequence[Block],
) -> dict[str, BlockScales]:
    """Weight in fp8 -> its scales. `blocks` is what config.json allows.

    ValueError naming tensor and file where the two do not fit.
    """
    scales = {}
    for weight in sorted(name for name, dtype in dtypes.items() if dtype == _FP8):
        if not blocks:
            raise ValueError(
                f"{files[weight]}: {weight} is in fp8, of which the {QUANTIZATION} in config.json says nothing;"
                f" copy config.json again, or {CONVERT}"
            )
        name = next((weight + suffix for suffix in _SUFFIXES if weight + suffix in shapes), None)
        if name is None:
            known = " or ".join(weight + suffix for suffix in _SUFFIXES)
            raise ValueError(f"{files[weight]}: {weight} is in fp8 without scales {known}; copy them again")
        block_size = _find_block_size(weight, name, shapes, files, blocks)
        if dtypes[name] not in SCALE_DTYPES:
            raise ValueError(f"{files[name]}: {name} is {dtypes[name]}, not one of {', '.join(SCALE_DTYPES)}")
        scales[weight] = BlockScales(name=name, block_size=block_size)
    _check_others({name for name in shapes if name.endswith(_ENDINGS)}, scales, dtypes, files)
    return scales


def _find_block_size(
    weight: str,
    scale: str,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, Path],
    blocks: Sequence[Block],
) -> BlockSize:
    shape, found, wanted = shapes[weight], shapes[scale], []
    if len(shape) < 2:
        raise ValueError(f"{files[weight]}: {weight} is in fp8 with shape {shape}; only matrices have blocks")
    for rows, columns in blocks:
        block_size = rows or shape[-2], columns or shape[-1]
        wanted += _list_scale_shapes(shape, block_size)
        if found in wanted:
            return block_size
    raise ValueError(
        f"{files[scale]}: {scale} has shape {found}, but {weight} of {shape} has scales of"
        f" {' or '.join(map(str, wanted))} by config.json's {QUANTIZATION}; copy both again"
    )


def _list_scale_shapes(shape: tuple[int, ...], block_size: BlockSize) -> list[tuple[int, ...]]:
    counts = tuple(-(-size // block) for size, block in zip(shape[-2:], block_size, strict=True))
    return [(*shape[:-2], *counts), *([(1,), ()] if block_size == shape else [])]


def _check_others(
    names: set[str], scales: Mapping[str, BlockScales], dtypes: Mapping[str, str], files: Mapping[str, Path]
) -> None:
    """Every name of scales must be of a weight in fp8, and the only one."""
    for name in sorted(names - {one.name for one in scales.values()}):
        weight = name.removesuffix("_inv").removesuffix("_scale")
        found = f"is {dtypes[weight]}" if weight in dtypes else "is missing"
        if weight in scales:
            found = f"has {scales[weight].name} too"
        raise ValueError(f"{files[name]}: {name} has the scales of a weight in fp8, but {weight} {found}")


def is_inference_scale(name: str) -> bool:
    """Of activations or of the cache of keys and values, for whoever computes in fp8: no weight depends on it."""
    return name.rpartition(".")[2] in _OF_ACTIVATIONS | _OF_CACHE


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
    by_row = scales.float().repeat_interleave(rows, 0)[row_offset : row_offset + values.shape[0]]
    for number in range(by_row.shape[1]):  # in place: scales of the weight's own size would be a second copy
        first, end = number * columns - column_offset, (number + 1) * columns - column_offset
        values[:, max(0, first) : end] *= by_row[:, number, None]
    return values
