"""A native base rounded to what a quantised one holds: the oracle of whatever computes with quantised weights."""

import torch

from lora_dist.base_format import find_linear_format
from lora_dist.mcore.experts import ExpertLinears, list_weights
from lora_dist.mcore.layers import LoraLinear
from lora_dist.mcore.model import ShardedGpt
from lora_dist.quant.weight import build_quantized_weight


@torch.no_grad()
def apply_rounding(gpt: ShardedGpt, base_format: str) -> None:
    """Quantise every weight that the format is for, each by itself, and put back what that stands for."""
    for linear in gpt.modules():
        if not isinstance(linear, LoraLinear | ExpertLinears):
            continue
        for expert, weight in list_weights(linear):
            own_format = find_linear_format(base_format, of_experts=expert is not None)
            if own_format != "native":
                quantized = build_quantized_weight(own_format, weight, column_parallel=linear.column_parallel)
                quantized.fill(weight)
                weight.copy_(quantized.dequantize(torch.float32))
