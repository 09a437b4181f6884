"""Weights published in MXFP4, as gpt-oss' experts: codes of 4 bits with a power of two for each 32 of a row; pure.

Shapes: E experts, O output features, G blocks of a row of input features; a weight [E, 32 G, O] is stored as codes
[E, O, G, 16], two a byte, the low half first, and scales [E, O, G], exponents of two plus 127 (OCP Microscaling
Formats, version 1.0, sections 5.3.3 and 5.4.1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.base_format import MXFP4_BLOCK
from lora_dist.files.quantization import QUANTIZATION

_METHOD = "mxfp4"
_CODES, _SCALES = "_blocks", "_scales"
_BYTES = MXFP4_BLOCK // 2


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are in it. Which ones, the files say."""
    settings = config.get(QUANTIZATION)
    return isinstance(settings, dict) and settings.get("quant_method") == _METHOD


def find_packed(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], files: Mapping[str, Path]
) -> dict[str, tuple[str, str]]:
    """Weight -> its codes and its scales, by stored name. ValueError naming tensor and file where they do not fit."""
    packed = {}
    for codes in [name for name in shapes if name.endswith(_CODES)]:
        weight = codes.removesuffix(_CODES)
        scales = weight + _SCALES
        if scales not in shapes:
            raise ValueError(f"{files[codes]}: {codes} is in MXFP4 without {scales}; copy the checkpoint again")
        if shapes[codes] != (*shapes[scales], _BYTES) or len(shapes[scales]) != 3:
            raise ValueError(
                f"{files[codes]}: {codes} has shape {shapes[codes]} and {scales} has {shapes[scales]}; MXFP4's are"
                f" [experts, out, blocks, {_BYTES}] and [experts, out, blocks]"
            )
        for name in (codes, scales):
            if dtypes[name] != "U8":
                raise ValueError(f"{files[name]}: {name} is {dtypes[name]}, but MXFP4 is stored as U8")
        packed[weight] = codes, scales
    return packed


def compute_shape(scales: tuple[int, ...]) -> tuple[int, ...]:
    """Of the weight, from that of its scales."""
    E, O, G = scales  # noqa: E741
    return E, G * MXFP4_BLOCK, O
