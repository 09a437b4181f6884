"""A step asks the device for nothing before its end, so that a GPU's queue is never drained on the way."""

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from device_labels import LABELLED, label_devices
from operations import DEVICE_WAITS
from processes import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode
from toy import MODEL, Case, build_batches, build_case

from lora_dist.config import LoraConfig
from lora_dist.mcore.schedule import forward_backward

pytestmark = pytest.mark.usefixtures("small_tiles")

DELTA = {
    "model": replace(
        MODEL, family="qwen3_5_text", full_attention_layers=[1], delta_key_heads=2, delta_value_heads=4,
        delta_key_size=4, delta_value_size=6, delta_kernel_size=4,
    ),
    "lora": LoraConfig(rank=2, target_modules=["all"]),
}  # fmt: skip
WINDOWS = {
    "model": replace(
        MODEL, family="gemma3_text", num_kv_heads=2, sliding_window=5, full_attention_layers=[1], local_rope_theta=100.0
    ),
    "lora": LoraConfig(rank=2, target_modules=["all"]),
}


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in DEVICE_WAITS:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_waits(case: Case) -> Counter[str]:
    """Of the second step: the first asks once whether the frozen norms can be inverted."""
    gpt, _, topology = build_case(case)
    for step in range(2):
        batches = build_batches(topology)
        with Waits() as waits:
            forward_backward(gpt, batches, seed=0, step=step, scale_loss=None)
    return waits.counts


@pytest.mark.parametrize(
    ("options", "num_rng_checks"),
    [
        *(({}, 0), ({"tp_size": 2, "sequence_parallel": True}, 4), ({"pp_size": 2, "recompute": "full"}, 0)),
        *((DELTA, 0), (WINDOWS, 0)),
    ],
    ids=["one", "sequence parallel", "stages", "delta nets", "windows"],
)
def test_a_step_waits_for_its_loss_alone(options: dict, num_rng_checks: int) -> None:
    """Megatron's checks of the host's own generator, with sequence parallelism, are no wait either."""
    case = Case(**options)
    for counts in run_distributed(count_waits, case.world_size, case):
        assert counts["nonzero"] == 2, "the targets of each microbatch, from a mask that is still on the host"
        assert counts["_local_scalar_dense"] == 2 + num_rng_checks, "the loss and the wish to stop"
        assert counts.keys() == {"nonzero", "_local_scalar_dense"}


def count_crossings(case: Case) -> tuple[Counter[str], int]:
    """Of the second step, and how many tensors its microbatches are."""
    with label_devices() as crossings:
        gpt, _, topology = build_case(case, LABELLED)
        for step in range(2):
            batches = build_batches(topology)
            crossings.clear()
            forward_backward(gpt, batches, seed=0, step=step, scale_loss=None)
    given = [value for batch in batches for value in (getattr(batch, one.name) for one in fields(batch))]
    return +crossings, sum(isinstance(value, torch.Tensor) for value in given)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(tp_size=2, sequence_parallel=True, lora=LoraConfig(rank=2, dropout=0.1)),
        Case(pp_size=2, recompute="full"),
        Case(cp_size=2),
        Case(method="full", label_smoothing=0.1),
        Case(model=replace(MODEL, family="llama", num_kv_heads=2), lora=LoraConfig(rank=2, use_dora=True)),
        Case(method="prefix_layer"),
        Case(**DELTA),
        Case(**WINDOWS),
    ],
    ids=str,
)
def test_what_a_step_copies_to_the_device_are_its_microbatches(case: Case) -> None:
    """From the host's plain memory a copy would wait for all that runs."""
    for crossings, num_given in run_distributed(count_crossings, case.world_size, case):
        assert crossings == {"to": num_given + 2 * 2}, "and of each microbatch its targets' places and rows' keys"
