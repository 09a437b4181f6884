"""Blocks of weights into codes and one scale each, and back: NF4 through bitsandbytes' kernels, FP8 and MXFP4 in plain
torch.

NF4 (arXiv:2305.14314, section 3): 16 levels, quantiles of a normal distribution, times the block's largest magnitude.
FP8: e4m3 values times the largest magnitude / 448.
MXFP4 (OCP Microscaling Formats, version 1.0, section 6.3): e2m1 values times a power of two, 4 being the power that the
largest magnitude is brought to.

Shapes: O rows, H columns, K blocks of a row, H / 32 of MXFP4 and H / 64 of the others; codes as bytes, two weights a
byte where they have 4 bits.
"""

import logging
import sys
from typing import Any

import torch

from lora_dist.base_format import BLOCK, MXFP4_BLOCK
from lora_dist.fusion import Chain

_FP8 = torch.float8_e4m3fn
_SMALLEST = torch.finfo(torch.float32).tiny
_BELOW = torch.nextafter(torch.tensor([0.75, 1.75, 3.5]), torch.tensor(0.0)).tolist()
_ENDS = (0.25, _BELOW[0], 1.25, _BELOW[1], 2.5, _BELOW[2], 5.0)
"""The largest numbers that are rounded to 0, 0.5, 1, 1.5, 2, 3 and 4 in e2m1: from half way to the even one."""
_EXPONENT_BIAS = 127


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


def quantize_mxfp4(weight_OH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes, [O H / 2], the earlier weight in a byte's low half) and the scales' exponents (bytes, [O, K]) of
    fp32 weights. What is in MXFP4 already comes back as it was.
    """
    blocks_OKx = weight_OH.unflatten(-1, (-1, MXFP4_BLOCK))
    exponents_OK = (torch.frexp(blocks_OKx.abs().amax(-1)).exponent - 3).clamp(-_EXPONENT_BIAS, _EXPONENT_BIAS)
    scaled_OKx = torch.ldexp(blocks_OKx, -exponents_OK[..., None])
    ends = torch.tensor(_ENDS, device=weight_OH.device)
    codes_OKx = torch.bucketize(scaled_OKx.abs(), ends, out_int32=True).to(torch.uint8)
    codes_OKx |= (scaled_OKx < 0).to(torch.uint8) << 3
    codes = codes_OKx[..., ::2] | codes_OKx[..., 1::2] << 4
    return codes.flatten(), (exponents_OK + _EXPONENT_BIAS).to(torch.uint8)


def dequantize_mxfp4(codes: torch.Tensor, exponents_OK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, H] in `dtype`, rounded once: not at all in bf16 and fp32, for scales up to 2^121.

    The bits of an e2m1 value are those of an e4m3 one that is 64 times smaller.
    """
    low, high = (codes & 8) << 4 | (codes & 7) << 2, codes & 128 | (codes & 112) >> 2
    values_OKx = torch.stack([low, high], dim=-1).view(_FP8).view(*exponents_OK.shape, MXFP4_BLOCK)
    return _scale_blocks(values_OKx, torch.exp2(exponents_OK.float() + (6 - _EXPONENT_BIAS)), dtype).flatten(1)
