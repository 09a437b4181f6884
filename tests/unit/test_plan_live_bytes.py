"""The live account on real tensors: every storage once, under the kind it has at the moment."""

import torch
from torch import nn

from lora_dist.plan.live_bytes import (
    BASE,
    COMMUNICATION,
    GRADIENTS,
    HOST,
    LOGITS,
    SAVED,
    TRANSIENT,
    LiveBytes,
    watch_gradients,
)

FP32 = 4


def test_a_storage_counts_once_and_until_it_dies() -> None:
    live = LiveBytes()
    tensor = torch.zeros(10)
    live.see(tensor)
    live.see(tensor[2:5])
    assert live.now[TRANSIENT] == live.total == 10 * FP32
    view = tensor[1:]
    del tensor
    assert live.total == 10 * FP32
    del view
    assert live.total == 0
    assert live.peak_total == 10 * FP32


def test_cuda_granularity() -> None:
    live = LiveBytes(granularity=512)
    tensors = [torch.zeros(1), torch.zeros(129)]
    for tensor in tensors:
        live.see(tensor)
    assert live.total == 512 + 1024


def test_the_account_at_the_peak_adds_up() -> None:
    live = LiveBytes()
    weight = torch.zeros(100)
    live.declare([weight], BASE)
    first = torch.zeros(50)
    live.see(first)
    second = torch.zeros(30)
    live.see(second, LOGITS)
    del first, second
    third = torch.zeros(60)
    live.see(third)
    live.note_communication(third)
    assert live.peak_total == 180 * FP32
    assert {kind: size for kind, size in live.peak.items() if size} == {
        BASE: 100 * FP32,
        TRANSIENT: 50 * FP32,
        LOGITS: 30 * FP32,
    }
    assert live.largest[COMMUNICATION] == 60 * FP32
    live.restart_peak()
    assert live.peak_total == 160 * FP32


def test_host_memory_is_in_no_sum() -> None:
    live = LiveBytes()
    offloaded, rest = torch.zeros(7), torch.zeros(3)
    live.declare([offloaded], HOST)
    live.see(rest)
    live.declare_rest(COMMUNICATION, (HOST,))
    assert (live.total, live.now[HOST], live.now[COMMUNICATION]) == (3 * FP32, 7 * FP32, 3 * FP32)


def test_saved_while_autograd_holds_it_then_a_gradient() -> None:
    live = LiveBytes()
    linear = nn.Linear(8, 16, bias=False)
    live.declare(linear.parameters(), BASE)
    stop = watch_gradients(live, linear.parameters())
    with live.watch_saved():
        out = linear(torch.zeros(5, 8)).exp()
        assert live.now[SAVED] == FP32 * (5 * 8 + 5 * 16)  # the input, and exp's own output
        out.sum().backward()
    stop()
    assert live.now[SAVED] == 0
    assert live.now[GRADIENTS] == live.largest[GRADIENTS] == FP32 * 8 * 16
    assert live.now[BASE] == FP32 * 8 * 16
    del out
    linear.weight.grad = None
    assert live.total == FP32 * 8 * 16
