"""A step asks the device for nothing before its end, so that a GPU's queue is never drained on the way."""

from collections import Counter
from typing import Any

import pytest
import torch
from processes import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Case, build_batches, build_case

from lora_dist.mcore.schedule import forward_backward

_aten = torch.ops.aten
WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default}
"""What needs a value on the host."""


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in WAITS:
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
    [({}, 0), ({"tp_size": 2, "sequence_parallel": True}, 4), ({"pp_size": 2, "recompute": "full"}, 0)],
    ids=str,
)
def test_a_step_waits_for_its_loss_alone(options: dict, num_rng_checks: int) -> None:
    """Megatron's checks of the host's own generator, with sequence parallelism, are no wait either."""
    case = Case(**options)
    for counts in run_distributed(count_waits, case.world_size, case):
        assert counts["nonzero"] == 2, "the targets of each microbatch, from a mask that is still on the host"
        assert counts["_local_scalar_dense"] == 2 + num_rng_checks, "the loss and the wish to stop"
        assert counts.keys() == {"nonzero", "_local_scalar_dense"}
