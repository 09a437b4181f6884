"""Weights published in MXFP4, as gpt-oss' experts: codes of 4 bits with a power of two for each 32 of a row; pure.

Shapes: E experts, O output features, G blocks of a row of input features; a weight [E, 32 G, O] is stored as codes
[E, O, G, 16], two a byte, the low half first, and scales [E, O, G], exponents of two plus 127 (OCP Microscaling
Formats, version 1.0, sections 5.3.3 and 5.4.1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_dist.files.fp8_blocks import QUANTIZATION

BLOCK = 32
"""Values that share a scale."""
_METHOD = "mxfp4"
_CODES, _SCALES = "_blocks", "_scales"
_BYTES, _BIAS = 16, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of a code's three low bits; its fourth one is the sign."""


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
    return E, G * BLOCK, O


def dequantize(codes_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Values [O, 32 G] of one expert, in bf16, which holds them exactly."""
    values = torch.tensor([*_MAGNITUDES, *(-one for one in _MAGNITUDES)], device=codes_OGB.device)
    low_and_high = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1).bfloat16()
    pairs_OGB2 = low_and_high.index_select(0, codes_OGB.flatten().int()).view(*codes_OGB.shape, 2)
    exponents_OG = scales_OG.float().sub_(_BIAS)
    return (pairs_OGB2.flatten(2) * exponents_OG.exp2_().bfloat16()[..., None]).flatten(1)
