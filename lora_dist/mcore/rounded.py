"""A quantised base made native, of the very values that it computes with: what the merged model is written from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lora_dist.lora.experts import ExpertAdapter
from lora_dist.lora.layer import LoraShard
from lora_dist.mcore.experts import ExpertLinears, list_weights, split_by_expert
from lora_dist.mcore.layers import LoraLinear
from lora_dist.mcore.model import ShardedGpt
from lora_dist.quant.weight import QuantizedWeight


@dataclass(kw_only=True, slots=True)
class RoundingError:
    """Of weights in the model's dtype against their fp32 values, over the whole model."""

    largest: float = 0.0
    sum_of_squares: float = 0.0
    num_weights: int = 0

    @property
    def rms(self) -> float:
        return math.sqrt(self.sum_of_squares / max(1, self.num_weights))

    def add(self, difference: torch.Tensor) -> None:
        self.largest = max(self.largest, difference.abs().max().item())
        self.sum_of_squares += difference.square().sum(dtype=torch.float64).item()
        self.num_weights += difference.numel()


@torch.no_grad()
def dequantize_base(gpt: ShardedGpt, shards: Mapping[str, LoraShard] | None = None) -> RoundingError:
    """Put a native weight in place of every quantised one, with `shards` (by linear's local name) merged, rounded once.

    The sum is formed in fp32: W = dequantised + B A is the model that trained over the quantised base. What rounding
    it to the model's dtype changes is returned, the same on every process. Collective.
    """
    error, adapters = RoundingError(), split_by_expert(shards or {})
    for name, linear in gpt.named_modules():
        if not isinstance(linear, LoraLinear | ExpertLinears):
            continue
        stored = linear.weight
        native = torch.empty(stored.shape, dtype=gpt.config.params_dtype, device=stored.device)
        for expert, weight in list_weights(linear):
            weight_OH = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
            if (shard := adapters.get((name, expert))) is not None:
                _merge(shard, weight_OH)
            rounded = native if expert is None else native[expert]
            rounded.copy_(weight_OH)
            error.add(rounded.float() - weight_OH)
        del linear.weight
        linear.weight = nn.Parameter(native, requires_grad=False)
    return _join(error, gpt)


def _merge(shard: LoraShard | ExpertAdapter, weight_OH: torch.Tensor) -> None:
    """In place, in fp32. With DoRA collective over TP where rows are split."""
    for spec, rows in shard.list_rows():
        if rows is None:
            weight_OH.copy_(shard.compute_merged(spec, weight_OH))
        else:
            weight_OH[rows] = shard.compute_merged(spec, weight_OH[rows])


def _join(error: RoundingError, gpt: ShardedGpt) -> RoundingError:
    """Over the shards of one replica."""
    errors = [error] * dist.get_world_size(gpt.topology.model_parallel_group)
    dist.all_gather_object(errors, error, group=gpt.topology.model_parallel_group)
    return RoundingError(
        largest=max(one.largest for one in errors),
        sum_of_squares=sum(one.sum_of_squares for one in errors),
        num_weights=sum(one.num_weights for one in errors),
    )
