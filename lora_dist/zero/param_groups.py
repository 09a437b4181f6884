"""The optimizer's groups of parameters, as many on every stage of a pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_dist.config import OptimConfig
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology


def build_groups(
    trainable: list[TrainableParameter], optim: OptimConfig, topology: Topology
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Matrices decay, vectors do not, and biases of experts are vectors too; lora_B has its own learning rate where
    LoRA+ asks for one.

    DeepSpeed adds up the gradients' norm group by group over the stages of a pipeline, so that each has every group
    that any might have: those without a tensor of its own get a placeholder, which never has a gradient. The second
    value lists these.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {
        key: [] for key in ((optim.weight_decay, 1.0), (0.0, 1.0), (optim.weight_decay, optim.lora_plus_ratio))
    }
    for one in trainable:
        decay = optim.weight_decay if len(one.full_shape) > 1 and one.kind != "bias" else 0.0
        ratio = optim.lora_plus_ratio if one.kind == "lora_B" else 1.0
        groups[decay, ratio].append(one.parameter)
    dtype = trainable[0].parameter.dtype if trainable else torch.float32
    placeholders = []
    for members in groups.values() if topology.pp_size > 1 else ():
        if not members:
            members.append(nn.Parameter(torch.zeros(1, dtype=dtype, device=topology.device)))
            placeholders += members
    built = [{"params": ps, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), ps in groups.items() if ps]
    return built, placeholders


@contextmanager
def registered(model: nn.Module, placeholders: list[nn.Parameter]) -> Iterator[None]:
    """While DeepSpeed looks up its parameters' names in the model, which has them no longer than that."""
    names = [f"nothing_trains_here_{number}" for number in range(len(placeholders))]
    for name, placeholder in zip(names, placeholders, strict=True):
        model.register_parameter(name, placeholder)
    yield
    for name in names:
        delattr(model, name)
