"""MXFP4's codes and scales against transformers' values of them, and how weights become such."""

import itertools

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_dist.files.mxfp4_blocks import compute_shape
from lora_dist.quant.blocks import dequantize_mxfp4, quantize_mxfp4


def test_every_code_at_every_scale_is_that_of_transformers() -> None:
    """In bf16, which holds them, up to scales of 2^121."""
    scales_EOG = torch.arange(1, 249, dtype=torch.uint8).view(1, 4, 62)
    codes_EOGB = torch.arange(256, dtype=torch.uint8).view(16, 16)[torch.arange(248) % 16].view(1, 4, 62, 16)
    (expected_IO,) = convert_moe_packed_tensors(codes_EOGB, scales_EOG)
    actual_OI = dequantize_mxfp4(codes_EOGB[0].flatten(), scales_EOG[0], torch.bfloat16)
    assert actual_OI.dtype == torch.bfloat16
    assert actual_OI.isfinite().all()
    assert torch.equal(actual_OI.t(), expected_IO)
    assert compute_shape(tuple(scales_EOG.shape)) == (1, *expected_IO.shape)
    assert len(actual_OI.float().abs().unique()) > 248


VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_what_is_in_mxfp4_comes_back_as_it_was() -> None:
    """Whatever the largest code of a block is, of which a published scale need not make the most."""
    generator, rows = torch.Generator().manual_seed(0), []
    for largest, exponent in itertools.product(range(8), (-20, -3, 0, 9)):
        codes = torch.randint(0, largest + 1, (32,), generator=generator)
        signs = 1 - 2 * torch.randint(0, 2, (32,), generator=generator)
        rows.append(VALUES[codes] * signs * 2.0**exponent)
    weight_OH = torch.stack(rows).view(-1, 64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(weight_OH), dtype), weight_OH.to(dtype))


def test_every_weight_becomes_the_nearest_value() -> None:
    """Of two that are as near the one with the even code, and of those beyond the largest that one."""
    steps = torch.arange(-775, 775) / 100.0  # all that is half way between two values is among them
    blocks = torch.cat([torch.full((50, 1), 7.5), steps.view(50, 31)], dim=1)  # the first one makes each scale 1
    codes, exponents_OK = quantize_mxfp4(blocks)
    assert (exponents_OK == 127).all()
    actual = dequantize_mxfp4(codes, exponents_OK, torch.float32)
    distances = (blocks.abs()[..., None] - VALUES).abs()
    nearest = distances == distances.amin(-1, keepdim=True)
    even_first = torch.where(nearest, torch.arange(8) % 2, 2).argmin(-1)
    assert torch.equal(actual.abs(), VALUES[even_first])
    assert (actual * blocks >= 0).all()
