"""Blocks of 64 weights into codes and one scale each, and back: NF4 through bitsandbytes' kernels, FP8 in plain torch.

NF4 (arXiv:2305.14314, section 3): 16 levels, quantiles of a normal distribution, times the block's largest magnitude.
FP8: e4m3 values times the largest magnitude / 448.

Shapes: O rows, H columns, K = H / 64 blocks of a row; codes as bytes, two weights a byte where they have 4 bits.
"""

import logging
import sys
from typing import Any

import torch

from lora_dist.base_format import BLOCK
from lora_dist.fusion import Chain

_FP8 = torch.float8_e4m3fn
_SMALLEST = torch.finfo(torch.float32).tiny


def import_bitsandbytes() -> Any:
    """bitsandbytes.functional. ValueError with the remedy where it is not installed."""
    if "bitsandbytes" not in sys.modules:
        # It warns of an optional kernel for single rows on the CPU, which is not used here.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            f"model.base_format=nf4 and nf4_double need bitsandbytes ({error}); pip install 'bitsandbytes>=0.50', or"
            " use model.base_format=fp8"
        ) from None
    return functional


def quantize_nf4(weight_OH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes, [O H / 2]) and fp32 scales [O, K] of fp32 weights."""
    codes, state = import_bitsandbytes().quantize_4bit(weight_OH, blocksize=BLOCK, quant_type="nf4")
    return codes.flatten(), state.absmax.view(weight_OH.shape[0], -1)


def dequantize_nf4(codes: torch.Tensor, scales_OK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, H] in `dtype` (fp32, bf16 or fp16), rounded once."""
    functional = import_bitsandbytes()
    shape = torch.Size((scales_OK.shape[0], scales_OK.shape[1] * BLOCK))
    state = functional.QuantState(
        absmax=scales_OK.flatten(), shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    weight_OH: torch.Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return weight_OH


def quantize_fp8(weight_OH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes, [O H]) and fp32 scales [O, K] of fp32 weights."""
    blocks_OKx = weight_OH.unflatten(-1, (-1, BLOCK))
    scales_OK = blocks_OKx.abs().amax(-1) / torch.finfo(_FP8).max
    codes = (blocks_OKx / scales_OK.clamp(min=_SMALLEST)[..., None]).to(_FP8)
    return codes.flatten().view(torch.uint8), scales_OK


def dequantize_fp8(codes: torch.Tensor, scales_OK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, H] in `dtype`, rounded once: every e4m3 value is exact in it, and the product is formed in fp32."""
    values_OKx = codes.view(_FP8).view(*scales_OK.shape, BLOCK)
    return _scale_blocks(values_OKx, scales_OK, dtype).flatten(1)


@Chain
def _scale_blocks(values_OKx: torch.Tensor, scales_OK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values_OKx.to(dtype).mul_(scales_OK[..., None])
