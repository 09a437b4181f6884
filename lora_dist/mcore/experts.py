"""The MLP of a layer as several experts, each token's own and one for all of them: frozen or trained, TP-sharded.

Every TP rank holds a slice of every expert, so that the ranks' work is the same whatever the router picks, and what
they communicate is what a dense MLP's would be. Shapes: S sequence, B rows, H hidden, E experts, C experts of a token,
T = S B tokens.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.base_format import LinearShape
from lora_dist.lora.experts import ExpertAdapter, ExpertShard, Factors
from lora_dist.lora.function import BaseWeight
from lora_dist.lora.layer import LoraShard
from lora_dist.lora.row_groups import GROUPED_MULTIPLE, ExpertWeights, can_group
from lora_dist.mcore.gates import GateBounds
from lora_dist.mcore.layers import allocate, bring_to_ranks
from lora_dist.mcore.mixing import mix_experts
from lora_dist.mcore.router import Router
from lora_dist.mcore.shared_expert import SharedExpert
from lora_dist.quant.weight import QuantizedWeight


class ExpertMlp(nn.Module):
    """In place of Megatron's MLP, with its constructor: `config.model` says what there is to build."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        # DeepSpeed's ZeRO 3 gathers what is below this module with it: the linears' own forward is never called.
        self._z3_leaf = True
        self.router = Router(config)
        size = config.model.ffn_hidden_size // config.tensor_model_parallel_size
        self.linear_fc1 = ExpertLinears(config, 2 * size, config.hidden_size, column_parallel=True)
        self.linear_fc2 = ExpertLinears(config, config.hidden_size, size, column_parallel=False)
        self.bounds: GateBounds | None = None
        if config.model.architecture.bounded_gate:
            self.bounds = GateBounds(config.model.swiglu_alpha, config.model.swiglu_limit)
        self.shared_experts = None if config.model.shared_ffn_size is None else SharedExpert(config)
        self.choose_products(on_gpu=self.router.weight.device.type == "cuda")

    def choose_products(self, *, on_gpu: bool) -> None:
        """One call for all experts where the device has one, which a plan knows and its tensors do not."""
        sizes = self.config.hidden_size, self.linear_fc1.local_out_features // 2
        self.grouped = can_group(self.config.params_dtype, *sizes, on_gpu=on_gpu)

    def forward(self, hidden_SBH: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """The output, under sequence parallelism this rank's share as the input is, and no bias."""
        hidden_SBH = bring_to_ranks(hidden_SBH, self.config)
        tokens_TH = hidden_SBH.flatten(0, 1)
        weights_TC, choices_TC = self.router(tokens_TH)
        linears, multiple_of = (self.linear_fc1, self.linear_fc2), GROUPED_MULTIPLE if self.grouped else 1
        output_TH = mix_experts(
            tokens_TH,
            weights_TC,
            choices_TC,
            *(one.weight for one in linears),
            *(one.stack_factors(tokens_TH.dtype, multiple_of) for one in linears),
            biases=self._share_biases(),
            bounds=self.bounds,
            grouped=self.grouped,
        )
        partial_SBH = output_TH.view_as(hidden_SBH)
        if self.shared_experts is not None:
            partial_SBH = partial_SBH + self.shared_experts(hidden_SBH)
        return self._leave(partial_SBH), None

    def _share_biases(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of the second linears, whose outputs are summed over the ranks, this rank's equal share."""
        first, second = self.linear_fc1.bias, self.linear_fc2.bias
        return None if first is None or second is None else (first, second / self.config.tensor_model_parallel_size)

    def _leave(self, partial_SBH: torch.Tensor) -> torch.Tensor:
        group = ps.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial_SBH, group=group)
        return reduce_from_tensor_model_parallel_region(partial_SBH, group=group)


class ExpertLinears(nn.Module):
    """The same linear of all experts: this rank's slices of their weights, their biases and the adapters on them.

    The weight is one, [E, O, X], and so are the biases, [E, O], so that what watches, reduces, steps or dequantises
    weights has one a layer.
    """

    def __init__(
        self, config: TransformerConfig, out_features: int, in_features: int, *, column_parallel: bool
    ) -> None:
        super().__init__()
        self.local_out_features, self.column_parallel = out_features, column_parallel
        num_experts, base_format = config.model.num_experts, config.model.base_format
        self.weight: ExpertWeights
        if base_format == "native":
            self.weight = nn.Parameter(allocate(num_experts, out_features, in_features, config=config))
        else:
            shape = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
            device = torch.cuda.current_device()
            self.weight = QuantizedWeight(base_format, shape, num_experts=num_experts, device=device)
        bias = nn.Parameter(allocate(num_experts, out_features, config=config)) if config.add_bias_linear else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.lora: ExpertShard | None = None

    def stack_factors(self, dtype: torch.dtype, multiple_of: int) -> Factors | None:
        return None if self.lora is None else self.lora.stack_by_expert(dtype, multiple_of=multiple_of)


def choose_expert_products(gpt: nn.Module, *, on_gpu: bool) -> None:
    """As on that kind of device, where a model is built on none."""
    for module in gpt.modules():
        if isinstance(module, ExpertMlp):
            module.choose_products(on_gpu=on_gpu)


WeightPlace = tuple[str, int | None]
"""Local name of a linear, and of experts' linears whose weight is meant."""


def split_by_expert(shards: Mapping[str, LoraShard]) -> dict[WeightPlace, LoraShard | ExpertAdapter]:
    """What each single weight is to be merged with."""
    split: dict[WeightPlace, LoraShard | ExpertAdapter] = {}
    for name, shard in shards.items():
        if isinstance(shard, ExpertShard):
            split |= {(name, expert): own for expert, own in enumerate(shard.list_experts())}
        else:
            split[name, None] = shard
    return split


def list_weights(linear: nn.Module) -> Iterator[tuple[int | None, BaseWeight]]:
    """The weight of a linear, or each expert's, with the expert's number."""
    if isinstance(linear, ExpertLinears):
        yield from ((expert, linear.weight[expert]) for expert in range(linear.weight.shape[0]))
    else:
        yield None, cast(BaseWeight, linear.weight)
