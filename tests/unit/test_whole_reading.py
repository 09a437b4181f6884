"""Experts' single weights out of what a layer's are kept in: each stack read once, and no longer held than needed."""

import weakref

import torch
from torch import nn

from lora_dist.parameters import TrainableParameter
from lora_dist.whole import read_by_expert


def describe(name: str, stack: tuple[TrainableParameter, int] | None = None) -> TrainableParameter:
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    return TrainableParameter(
        name=name, parameter=parameter, full_shape=(2,), shard_dim=0, tp_partial_grad=False, kind="base", stack=stack
    )


def test_a_stack_is_read_once_and_dropped_when_the_next_ones_turn_comes() -> None:
    stacks, made = [describe("first"), describe("second")], []

    def read(one: TrainableParameter) -> dict[str, torch.Tensor]:
        value = torch.arange(6.0).view(3, 2) + 10 * len(made)
        made.append((one.name, weakref.ref(value)))
        return {"value": value}

    read_one = read_by_expert(read)
    for number, stack in enumerate(stacks):
        for expert in range(3):
            rows = read_one(describe(f"{stack.name}.{expert}", (stack, expert)))["value"].tolist()
            assert rows == [10 * number + 2 * expert, 10 * number + 2 * expert + 1]
    assert [name for name, _ in made] == ["first", "second"]
    assert made[0][1]() is None
    assert made[1][1]() is not None
    assert read_one(describe("plain"))["value"].shape == (3, 2)
