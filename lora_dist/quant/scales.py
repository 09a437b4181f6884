"""Scales of blocks in 8 bits each: the second level of QLoRA's double quantisation (arXiv:2305.14314, section 3).

As in the paper up to 256 scales share their constants and are stored in 8 bits around an offset. Unlike there the codes
are evenly spaced between a group's smallest and largest scale, and a group lies along the dimension that tensor
parallelism leaves whole: no constant depends on the topology (the paper subtracts the mean of the whole weight).

Of several experts' weights, one after the other, each has groups of its own.

Shapes: O rows, of all experts, K blocks of a row, N groups, G scales of a group.
"""

import torch

from lora_dist.base_format import BLOCK, LinearShape

_NUM_STEPS = 255
_SMALLEST = torch.finfo(torch.float32).tiny


def compress_scales(scales_OK: torch.Tensor, shape: LinearShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes, [N, G]) and fp32 ranges [N, 2], each a group's smallest scale and its step."""
    if not shape.column_parallel:
        scales_OK = scales_OK.unflatten(0, (-1, shape.out_features)).mT
    scales_NG = scales_OK.reshape(-1, shape.group_size)
    low_N, high_N = scales_NG.aminmax(dim=1)
    step_N = (high_N - low_N) / _NUM_STEPS
    codes_NG = (scales_NG - low_N[:, None]) / step_N.clamp(min=_SMALLEST)[:, None]
    return codes_NG.round_().to(torch.uint8), torch.stack([low_N, step_N], dim=1)


def expand_scales(codes_NG: torch.Tensor, ranges_N2: torch.Tensor, shape: LinearShape) -> torch.Tensor:
    """fp32 scales [O, K]; wrong by at most half a step."""
    scales_NG = torch.addcmul(ranges_N2[:, :1], codes_NG.float(), ranges_N2[:, 1:])
    num_blocks = shape.in_features // BLOCK
    if shape.column_parallel:
        return scales_NG.view(-1, num_blocks)
    return scales_NG.view(-1, num_blocks, shape.out_features).mT.reshape(-1, num_blocks)
