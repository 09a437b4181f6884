"""MXFP4's codes and scales against transformers' values of them."""

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_dist.files.mxfp4_blocks import compute_shape, dequantize


def test_every_code_at_every_scale_is_that_of_transformers() -> None:
    """In bf16, which holds them; but for the scales at the ends, where a product is no number of bf16."""
    scales_EOG = torch.arange(1, 253, dtype=torch.uint8).view(1, 4, 63)
    codes_EOGB = torch.arange(256, dtype=torch.uint8).view(16, 16)[torch.arange(252) % 16].view(1, 4, 63, 16)
    (expected_IO,) = convert_moe_packed_tensors(codes_EOGB, scales_EOG)
    actual_OI = dequantize(codes_EOGB[0], scales_EOG[0])
    assert actual_OI.dtype == torch.bfloat16
    assert actual_OI.isfinite().all()
    assert torch.equal(actual_OI.t(), expected_IO)
    assert compute_shape(tuple(scales_EOG.shape)) == (1, *expected_IO.shape)
    assert len(actual_OI.float().abs().unique()) > 252
