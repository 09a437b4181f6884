"""Bottlenecks put into Megatron's layers, whole on every tensor-parallel process: they communicate nothing.

Each acts after the row-parallel linear's reduction, so its input, the gradient of its output and its own gradients are
the same on every TP rank; under sequence parallelism they are of this rank's positions alone, and are summed once a
step as the norms' are.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.bottleneck.layer import Bottleneck
from lora_dist.bottleneck.spec import BottleneckSpec
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter

_ADDITION_OF_PLACE = {"attention": "self_attn_bda", "mlp": "mlp_bda", "block": "mlp_bda"}
_Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def apply_bottlenecks(
    gpt: ShardedGpt, specs: Sequence[BottleneckSpec], *, init_std: float, seed: int
) -> list[TrainableParameter]:
    """Freeze the base, put this stage's bottlenecks into its layers, and list what trains here."""
    gpt.requires_grad_(False)
    trainable: list[TrainableParameter] = []
    for spec in specs:
        if spec.layer in gpt.stage_layers:
            bottleneck = Bottleneck(spec, init_std=init_std, seed=seed, device=gpt.topology.device)
            _put_into_layer(gpt.decoder.layers[spec.layer - gpt.first_layer], bottleneck)
            trainable += _describe(gpt, bottleneck)
    return trainable


def _put_into_layer(layer: nn.Module, bottleneck: Bottleneck) -> None:
    place = bottleneck.spec.place
    layer.add_module(f"{place}_bottleneck", bottleneck)
    setattr(layer, _ADDITION_OF_PLACE[place], ResidualAddition(bottleneck, layer.config.model.residual_multiplier))
    # Megatron turns gradients on around the addition, in evaluation too, which would keep every layer's graph.
    layer.bias_dropout_add_exec_handler = nullcontext


class ResidualAddition:
    """In place of Megatron's bias-dropout-add: the sublayer's output through a bottleneck, before the sum or after."""

    def __init__(self, bottleneck: Bottleneck, scale: float) -> None:
        """`scale` multiplies what is added to the residual stream."""
        self._bottleneck, self._scale = bottleneck, scale

    def __call__(self, training: bool, fused: bool) -> _Add:
        """What Megatron calls with (output, bias), the residual and the dropout's probability."""

        def add(
            output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, probability: float
        ) -> torch.Tensor:
            output, bias = output_with_bias
            branch = F.dropout(output if bias is None else output + bias, probability, training)
            if self._bottleneck.spec.place == "block":
                return self._bottleneck(torch.add(residual, branch, alpha=self._scale))
            return torch.add(residual, self._bottleneck(branch), alpha=self._scale)

        return add


def _describe(gpt: ShardedGpt, bottleneck: Bottleneck) -> list[TrainableParameter]:
    return [
        TrainableParameter(
            name=f"{bottleneck.spec.name}.{key}",
            parameter=bottleneck.get_parameter(key),
            full_shape=shape,
            shard_dim=None,
            tp_partial_grad=gpt.topology.sequence_parallel,
            kind="bottleneck",
        )
        for key, shape in bottleneck.spec.shapes.items()
    ]
