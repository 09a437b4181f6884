"""Run a function on several local CPU processes joined by gloo, and bring back what each returns."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: object, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(*args)` on `world_size` forked processes of one group; their results, by global rank.

    Results are plain data or CPU tensors. AssertionError with every failing process's traceback, the earliest first;
    processes that still run after `timeout_s` are killed and named. `fn` must not touch CUDA.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        workers = [
            context.Process(target=_work, args=(global_rank, world_size, directory, timeout_s, backend, fn, args))
            for global_rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        hung = _join(workers, timeout_s)
        reports = sorted(directory.glob("failure*.txt"), key=lambda report: report.stat().st_mtime_ns)
        messages = [report.read_text() for report in reports]
        if hung:
            messages.append(f"global ranks {hung} killed after {timeout_s:.0f} s")
        if messages or any(worker.exitcode != 0 for worker in workers):
            raise AssertionError("\n".join(messages or [f"exit codes {[worker.exitcode for worker in workers]}"]))
        # Written by the workers above, so unpickling reads nothing foreign; tests return mixed plain data.
        return [
            torch.load(directory / f"result{global_rank}.pt", weights_only=False) for global_rank in range(world_size)
        ]


_ALONE: dict[tuple[Callable[..., Any], str], Any] = {}


def run_alone(fn: Callable[..., Any], *args: object) -> Any:
    """What `fn(*args)` gives on one process; computed once for arguments that are written alike."""
    key = (fn, repr(args))
    if key not in _ALONE:
        (_ALONE[key],) = run_distributed(fn, 1, *args)
    return _ALONE[key]


def _join(workers: list[Any], timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    for worker in workers:
        worker.join(timeout=max(0.0, deadline - time.monotonic()))
    hung = [global_rank for global_rank, worker in enumerate(workers) if worker.is_alive()]
    for global_rank in hung:
        workers[global_rank].kill()
        workers[global_rank].join()
    return hung


def _work(
    global_rank: int,
    world_size: int,
    directory: Path,
    timeout_s: float,
    backend: str,
    fn: Callable[..., Any],
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(global_rank)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{directory}/store",
            rank=global_rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        torch.save(fn(*args), directory / f"result{global_rank}.pt")
        dist.barrier()  # a process that left at once could be missed by one that still connects
        dist.destroy_process_group()
    except BaseException:
        (directory / f"failure{global_rank}.txt").write_text(
            f"global rank {global_rank} of {world_size}:\n{traceback.format_exc()}"
        )
        raise SystemExit(1) from None
