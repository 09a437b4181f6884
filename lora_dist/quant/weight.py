"""The weight of one frozen linear's shard, quantised: filled once, dequantised for each product and dropped again.

Shapes: O output features of the shard, H input features of the shard, K = H / 64 blocks of a row.
"""

import torch
from torch import nn

from lora_dist.base_format import LinearShape, check_blocks, compute_buffer_bytes
from lora_dist.quant.blocks import (
    dequantize_fp8,
    dequantize_nf4,
    import_bitsandbytes,
    quantize_fp8,
    quantize_nf4,
)
from lora_dist.quant.scales import compress_scales, expand_scales

_ELEMENTS_AT_ONCE = 2**24
"""Weights quantised in one go: it bounds what the kernels need beside them."""


class QuantizedWeight(nn.Module):
    """Stands where a linear's weight Parameter would; `model.base_format` nf4, nf4_double or fp8.

    The buffers are plain bytes, fp32 and fp8 numbers too, so that no cast of the model's floats touches them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    ranges: torch.Tensor

    def __init__(self, base_format: str, shape: LinearShape, *, device: torch.device | None = None) -> None:
        """ValueError where blocks would cross rows, or where bitsandbytes is needed and missing."""
        super().__init__()
        check_blocks(base_format, shape.in_features)
        if base_format != "fp8":
            import_bitsandbytes()
        self.base_format, self.linear_shape = base_format, shape
        for name, nbytes in compute_buffer_bytes(base_format, shape).items():
            self.register_buffer(name, torch.empty(nbytes, dtype=torch.uint8, device=device))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.linear_shape.out_features, self.linear_shape.in_features))

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @torch.no_grad()
    def fill(self, weight_OH: torch.Tensor) -> None:
        """Quantise the shard's weight, some rows at a time, on its device; it is rounded to fp32 at the most."""
        assert weight_OH.shape == self.shape
        quantize = quantize_fp8 if self.base_format == "fp8" else quantize_nf4
        codes = self.codes.view(self.shape[0], -1)
        scales_OK = torch.empty(self.shape[0], self.linear_shape.num_scales // self.shape[0], device=self.device)
        num_rows = max(1, _ELEMENTS_AT_ONCE // self.shape[1])
        for start in range(0, self.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            some_codes, scales_OK[rows] = quantize(weight_OH[rows].float())
            codes[rows] = some_codes.view_as(codes[rows])
        self._write_scales(scales_OK)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor [O, H] in `dtype` (fp32, bf16 or fp16)."""
        dequantize = dequantize_fp8 if self.base_format == "fp8" else dequantize_nf4
        return dequantize(self.codes, self._read_scales(), dtype)

    def _write_scales(self, scales_OK: torch.Tensor) -> None:
        if self.base_format != "nf4_double":
            self.scales.copy_(scales_OK.flatten().view(torch.uint8))
            return
        codes_NG, ranges_N2 = compress_scales(scales_OK, self.linear_shape)
        self.scales.copy_(codes_NG.flatten())
        self.ranges.copy_(ranges_N2.flatten().view(torch.uint8))

    def _read_scales(self) -> torch.Tensor:
        """fp32 [O, K]."""
        if self.base_format != "nf4_double":
            return self.scales.view(torch.float32).view(self.shape[0], -1)
        codes_NG = self.scales.view(-1, self.linear_shape.group_size)
        return expand_scales(codes_NG, self.ranges.view(torch.float32).view(-1, 2), self.linear_shape)


def build_quantized_weight(base_format: str, weight_OH: torch.Tensor, *, column_parallel: bool) -> QuantizedWeight:
    """Room for a native linear's weight, on its device; not yet filled."""
    out_features, in_features = weight_OH.shape
    shape = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
    return QuantizedWeight(base_format, shape, device=weight_OH.device)


def find_quantized(module: nn.Module) -> list[QuantizedWeight]:
    """Every quantised weight in it, in its modules' order."""
    return [one for one in module.modules() if isinstance(one, QuantizedWeight)]
