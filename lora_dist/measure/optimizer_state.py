"""The start-up invariant of LoRA under ZeRO: Adam's state is 12 bytes a trainable parameter over DP, and no more.

4 bytes each for the fp32 master and the two moments. What is exact, per process, with dp replicas:

| stage | elements of state                                                              |
| 0     | every trainable parameter, which is its own master                             |
| 1, 2  | per optimizer group, its elements made a multiple of 2 dp, divided by dp       |
| 3     | per parameter, its elements made a multiple of dp, divided by dp               |

Adam's step counts, one scalar a partition, are left out. A pipeline stage that trains nothing has one element.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology

BYTES_PER_ELEMENT = 12
_ALIGNMENT = 2
"""Elements to which DeepSpeed aligns each replica's part of a flattened group."""
_MOMENTS = {"exp_avg", "exp_avg_sq"}


class PartitionedOptimizer(Protocol):
    """What is looked at of `lora_dist.zero.engine.ZeroEngine`."""

    deepspeed: Any
    stage: int

    @property
    def placeholders(self) -> Sequence[torch.nn.Parameter]: ...

    @property
    def adam(self) -> torch.optim.AdamW: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """Checked bytes of one process."""

    state_bytes: int
    """Masters and both moments, padding included."""
    padding_bytes: int
    """What of it is this process's even share of the partitions' padding."""
    num_elements: int
    """Elements that Adam steps on this process."""


def check_optimizer_state(
    zero: PartitionedOptimizer, gpt: nn.Module, trainable: Sequence[TrainableParameter], topology: Topology
) -> OptimizerState:
    """Measure Adam's state. RuntimeError with the numbers where it is not exactly what the table above says.

    And where a frozen parameter has a gradient or a state of its own. Nothing is communicated.
    """
    wanted = [*(one.parameter for one in trainable), *zero.placeholders]
    _check_frozen(zero.adam, gpt, wanted)
    group_sizes = _read_group_sizes(zero, wanted)
    expected = compute_num_state_elements(group_sizes, stage=zero.stage, num_partitions=topology.zero_size)
    state_bytes = _measure_state_bytes(zero.adam)
    num_trainable = sum(_count_elements(one.parameter) for one in trainable)
    if state_bytes != BYTES_PER_ELEMENT * expected:
        raise RuntimeError(
            f"Adam's state takes {state_bytes} bytes on global_rank {topology.global_rank}, not {BYTES_PER_ELEMENT} x"
            f" {expected} = {BYTES_PER_ELEMENT * expected}: {num_trainable} trainable parameters at zero.stage="
            f"{zero.stage} over {topology.zero_size} processes"
        )
    num_partitions = 1 if zero.stage == 0 else topology.zero_size
    share = BYTES_PER_ELEMENT * num_trainable // num_partitions
    return OptimizerState(state_bytes=state_bytes, padding_bytes=state_bytes - share, num_elements=expected)


def compute_num_state_elements(group_sizes: Sequence[Sequence[int]], *, stage: int, num_partitions: int) -> int:
    """Elements of state on one process, by the table above; `group_sizes[g]` lists group g's parameters' elements."""
    if stage == 0:
        return sum(sum(sizes) for sizes in group_sizes)
    if stage == 3:
        return sum(-(-size // num_partitions) for sizes in group_sizes for size in sizes)
    return sum(-(-sum(sizes) // (_ALIGNMENT * num_partitions)) * _ALIGNMENT for sizes in group_sizes)


def _read_group_sizes(zero: PartitionedOptimizer, parameters: Sequence[torch.nn.Parameter]) -> list[list[int]]:
    """The optimizer's groups as DeepSpeed flattened them, checked against what should train."""
    if zero.stage == 0:
        groups = [group["params"] for group in zero.adam.param_groups]
    else:
        optimizer = zero.deepspeed.optimizer
        groups = optimizer.fp16_groups if zero.stage == 3 else optimizer.bit16_groups
    held = {id(parameter) for group in groups for parameter in group}
    wanted = {id(parameter) for parameter in parameters}
    if held != wanted:
        raise RuntimeError(
            f"the optimizer holds {len(held - wanted)} parameters that should not train"
            f" and lacks {len(wanted - held)} of {len(wanted)} that should"
        )
    return [[_count_elements(parameter) for parameter in group] for group in groups]


def _count_elements(parameter: Any) -> int:
    """ZeRO 3 empties a parameter between uses and remembers its size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _measure_state_bytes(adam: torch.optim.AdamW) -> int:
    total = 0
    for master, state in adam.state.items():
        unknown = set(state) - _MOMENTS - {"step"}
        assert not unknown, f"Adam keeps {unknown}, which the invariant does not know"
        total += master.nbytes + sum(state[moment].nbytes for moment in _MOMENTS)
    return total


def _check_frozen(adam: torch.optim.AdamW, gpt: nn.Module, parameters: Sequence[torch.nn.Parameter]) -> None:
    wanted = {id(parameter) for parameter in parameters}
    frozen = [(name, parameter) for name, parameter in gpt.named_parameters() if id(parameter) not in wanted]
    touched = [
        name
        for name, parameter in frozen
        if parameter.grad is not None or parameter.requires_grad or parameter in adam.state
    ]
    if touched:
        raise RuntimeError(
            f"{len(touched)} frozen parameters have a gradient or optimizer state: {', '.join(touched[:5])}"
        )
