"""Weights published in int4 with a scale for each group of a row's, as Kimi K2 Thinking's experts; pure.

Shapes: O output features, I input features, W words, G groups of a row; a weight [O, I] is stored as words of 32 bits
[O, W], eight codes each, the first in its lowest bits, a code being 8 more than what it stands for, and scales [O, G];
a value is that times its group's scale (compressed-tensors' format pack-quantized). A group is a block of one row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_dist.files.fp8_blocks import SCALE_DTYPES, BlockScales
from lora_dist.files.quantization import CODES_PER_WORD, CONVERT, QUANTIZATION

_CODES, _SCALES, _SHAPE = "_packed", "_scale", "_shape"
_REFUSED = {
    "_zero_point": "asymmetric int4, which has zero points",
    "_g_idx": "int4 whose groups are not neighbours",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """One weight: the stored names of its parts, and what it is."""

    codes: str
    scales: BlockScales
    shape: tuple[int, int]
    stored: tuple[str, ...]
    """All names that stand for it."""


def find_int4(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    files: Mapping[str, Path],
    group_sizes: Sequence[int],
) -> dict[str, PackedWeight]:
    """Weight -> its parts. `group_sizes` is what config.json allows.

    ValueError naming tensor and file where they do not fit.
    """
    found = {}
    for codes in [name for name in shapes if name.endswith(f".weight{_CODES}")]:
        weight = codes.removesuffix(_CODES)
        for suffix, what in _REFUSED.items():
            if weight + suffix in shapes:
                raise ValueError(f"{files[codes]} holds {weight}{suffix}: {what}, is not supported; {CONVERT}")
        scales, shape = weight + _SCALES, weight + _SHAPE
        if not group_sizes:
            raise ValueError(
                f"{files[codes]}: {weight} is in int4, of which the {QUANTIZATION} in config.json says nothing; copy"
                " config.json again"
            )
        if scales not in shapes or weight in shapes:
            problem = f"without {scales}" if scales not in shapes else f"and a second time in {files[weight]}"
            raise ValueError(f"{files[codes]}: {weight} is in int4 {problem}; copy the checkpoint again")
        if dtypes[codes] != "I32" or dtypes[scales] not in SCALE_DTYPES:
            raise ValueError(
                f"{files[codes]}: {codes} is {dtypes[codes]} and {scales} is {dtypes[scales]}, not I32 and one of"
                f" {', '.join(SCALE_DTYPES)}"
            )
        group_size = _find_group_size(codes, scales, shapes, files, group_sizes)
        found[weight] = PackedWeight(
            codes=codes,
            scales=BlockScales(name=scales, block_size=(1, group_size)),
            shape=(shapes[scales][0], shapes[scales][1] * group_size),
            stored=(codes, scales, *([shape] if shape in shapes else [])),
        )
    return found


def _find_group_size(
    codes: str,
    scales: str,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, Path],
    group_sizes: Sequence[int],
) -> int:
    for group_size in group_sizes:
        num_words = group_size // CODES_PER_WORD
        if len(shapes[scales]) == 2 and shapes[codes] == (shapes[scales][0], shapes[scales][1] * num_words):
            return group_size
    raise ValueError(
        f"{files[codes]}: {codes} has shape {shapes[codes]} and {scales} has {shapes[scales]}; int4's are"
        f" [out, in / {CODES_PER_WORD}] and [out, in / {' or '.join(map(str, group_sizes))}]"
    )


def unpack_int4(words_OW: torch.Tensor) -> torch.Tensor:
    """What the codes stand for, int8 [O, 8 W]."""
    two_a_byte = words_OW.view(torch.uint8)  # a word's lowest byte lies first
    return torch.stack([two_a_byte & 15, two_a_byte >> 4], -1).flatten(1).to(torch.int8) - 8
