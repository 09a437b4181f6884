"""What tests that watch operations share: what a storage is, what waits for the device, and for a collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_aten = torch.ops.aten
DEVICE_WAITS = {
    *(_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default)
}
"""What needs a value on the host."""


def identify_storage(tensor: torch.Tensor) -> int:
    """The same for all views of a storage, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def note_waits() -> Iterator[Callable[[], bool]]:
    """Within, the function given says whether `Work.wait` is running.

    gloo then copies out of memory of its own, where NCCL does nothing.
    """
    plain_wait, num_running = dist.Work.wait, 0

    def wait(work: dist.Work, *args: Any) -> bool:
        nonlocal num_running
        num_running += 1
        try:
            return plain_wait(work, *args)
        finally:
            num_running -= 1

    dist.Work.wait = wait
    try:
        yield lambda: num_running > 0
    finally:
        dist.Work.wait = plain_wait
