"""The weight of one frozen linear's shard, quantised: filled once, dequantised for each product and dropped again.

Or those of one linear of all experts, one after the other, each stored as it would be alone.

Shapes: E experts, O output features of the shard, H input features of the shard, K blocks of a row.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from lora_dist.base_format import LinearShape, check_blocks, compute_buffer_bytes, find_block
from lora_dist.quant.blocks import (
    dequantize_fp8,
    dequantize_mxfp4,
    dequantize_nf4,
    import_bitsandbytes,
    quantize_fp8,
    quantize_mxfp4,
    quantize_nf4,
)
from lora_dist.quant.scales import compress_scales, expand_scales

_QUANTIZE = {"nf4": quantize_nf4, "nf4_double": quantize_nf4, "fp8": quantize_fp8, "mxfp4": quantize_mxfp4}
_DEQUANTIZE = {"nf4": dequantize_nf4, "nf4_double": dequantize_nf4, "fp8": dequantize_fp8, "mxfp4": dequantize_mxfp4}
_ELEMENTS_AT_ONCE = 2**24
"""Weights quantised in one go: it bounds what the kernels need beside them."""
_STACK_AT_ONCE = 2**28
"""Weights of several experts dequantised in one go: half a GiB in 16 bits."""


class QuantizedWeight(nn.Module):
    """Stands where a linear's weight Parameter would; `model.base_format` nf4, nf4_double, fp8 or mxfp4.

    The buffers are plain bytes, fp32 and fp8 numbers too, so that no cast of the model's floats touches them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    ranges: torch.Tensor

    def __init__(
        self,
        base_format: str,
        shape: LinearShape,
        *,
        num_experts: int | None = None,
        device: torch.device | None = None,
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`shape` is one expert's; `memory` holds its buffers where it is a part of another.

        ValueError where blocks would cross rows, or where bitsandbytes is needed and missing.
        """
        super().__init__()
        self.base_format, self.linear_shape, self.num_experts = base_format, shape, num_experts
        stack = () if num_experts is None else (num_experts,)
        self.shape = torch.Size((*stack, shape.out_features, shape.in_features))
        if memory is None:
            check_blocks(base_format, {"a linear": shape.in_features})
            if base_format in ("nf4", "nf4_double"):
                import_bitsandbytes()
            sizes = compute_buffer_bytes(base_format, shape)
            memory = {name: torch.empty(*stack, size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
        for name, buffer in memory.items():
            self.register_buffer(name, buffer)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __getitem__(self, experts: int | slice) -> "QuantizedWeight":
        """One expert's weight, or those of neighbours as a stack, as of a tensor [E, O, H]: the same memory."""
        assert self.num_experts is not None
        num_experts = len(range(self.num_experts)[experts]) if isinstance(experts, slice) else None
        memory = {name: buffer[experts] for name, buffer in self.named_buffers(recurse=False)}
        return QuantizedWeight(self.base_format, self.linear_shape, num_experts=num_experts, memory=memory)

    @property
    def experts_at_once(self) -> int:
        """Experts of a stack that are dequantised in one go, so many that the parts are as equal as can be."""
        assert self.num_experts is not None
        most = max(1, _STACK_AT_ONCE // self.linear_shape.num_elements)
        return math.ceil(self.num_experts / math.ceil(self.num_experts / most))

    @property
    def is_divided(self) -> bool:
        """Whether a stack is too large to be dequantised in one go."""
        assert self.num_experts is not None
        return self.experts_at_once < self.num_experts

    @torch.no_grad()
    def fill(self, weight: torch.Tensor) -> None:
        """Quantise the shard's weight, some rows at a time, on its device; it is rounded to fp32 at the most."""
        assert weight.shape == self.shape
        weight_OH = weight.view(-1, self.linear_shape.in_features)
        codes = self.codes.view(len(weight_OH), -1)
        num_blocks = weight_OH.shape[1] // find_block(self.base_format)
        scales_OK = torch.empty(len(weight_OH), num_blocks, dtype=self._scale_dtype, device=self.device)
        num_rows = max(1, _ELEMENTS_AT_ONCE // weight_OH.shape[1])
        for start in range(0, len(weight_OH), num_rows):
            rows = slice(start, start + num_rows)
            some_codes, scales_OK[rows] = _QUANTIZE[self.base_format](weight_OH[rows].float())
            codes[rows] = some_codes.view_as(codes[rows])
        self._write_scales(scales_OK)

    def dequantize(self, dtype: torch.dtype, experts: int | slice = slice(None)) -> torch.Tensor:
        """A new tensor [O, H] or [E, O, H] in `dtype` (fp32, bf16 or fp16); of a stack the whole, or these experts'."""
        weight_OH = _DEQUANTIZE[self.base_format](self.codes[experts].view(-1), self._read_scales(experts), dtype)
        is_stack = self.num_experts is not None and isinstance(experts, slice)
        return weight_OH.view(-1, *self.shape[-2:]) if is_stack else weight_OH

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.uint8 if self.base_format == "mxfp4" else torch.float32

    def _write_scales(self, scales_OK: torch.Tensor) -> None:
        if self.base_format != "nf4_double":
            self.scales.copy_(scales_OK.view(torch.uint8).view_as(self.scales))
            return
        codes_NG, ranges_N2 = compress_scales(scales_OK, self.linear_shape)
        self.scales.copy_(codes_NG.reshape(self.scales.shape))
        self.ranges.copy_(ranges_N2.view(torch.uint8).view_as(self.ranges))

    def _read_scales(self, experts: int | slice) -> torch.Tensor:
        """[O, K], fp32 but for mxfp4's exponents, the experts' one after the other."""
        scales = self.scales[experts]
        if self.base_format != "nf4_double":
            num_blocks = self.linear_shape.in_features // find_block(self.base_format)
            return scales.view(self._scale_dtype).view(-1, num_blocks)
        codes_NG = scales.view(-1, self.linear_shape.group_size)
        return expand_scales(codes_NG, self.ranges[experts].view(torch.float32).view(-1, 2), self.linear_shape)


def build_quantized_weight(base_format: str, weight_OH: torch.Tensor, *, column_parallel: bool) -> QuantizedWeight:
    """Room for a native linear's weight, on its device; not yet filled."""
    out_features, in_features = weight_OH.shape
    shape = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
    return QuantizedWeight(base_format, shape, device=weight_OH.device)


def find_quantized(module: nn.Module) -> list[QuantizedWeight]:
    """Every quantised weight in it, in its modules' order."""
    return [one for one in module.modules() if isinstance(one, QuantizedWeight)]
