"""Says whether a collective is being waited for: gloo then copies out of memory of its own, where NCCL does nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def note_waits() -> Iterator[Callable[[], bool]]:
    """Within, the function given says whether `Work.wait` is running."""
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
