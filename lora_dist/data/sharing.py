"""Examples made by all processes of a job together: each encodes its share of the rows, and reads what the others made.

A million conversations take a process some twenty minutes; a job's processes would all take them.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_dist.data.examples import Examples, concatenate_examples
from lora_dist.data.rows import BadRows
from lora_dist.topology import Topology, run_on_all, run_on_first

Encode = Callable[[Sequence[Any], BadRows], Examples]
"""(rows, the bad ones of them) -> examples."""
_PREFIX = ".examples-"
_ARRAYS = ("tokens", "starts", "is_learnt")


class Share(Protocol):
    """How the rows of a file become examples: the same ones, in the same order, on every process."""

    def __call__(self, rows: Sequence[Any], encode: Encode, bad: BadRows) -> Examples: ...


def encode_alone(rows: Sequence[Any], encode: Encode, bad: BadRows) -> Examples:
    """All of them here."""
    return encode(rows, bad)


@contextmanager
def open_sharing(run_dir: str | Path, topology: Topology) -> Iterator[Share]:
    """Over all processes, by way of files in `run_dir` that are gone afterwards. Collective."""
    if topology.world_size == 1:
        yield encode_alone
        return
    directory = run_on_first(topology, lambda: _make_directory(Path(run_dir)))
    try:
        yield partial(_encode_together, directory=Path(directory), topology=topology)
    finally:
        if topology.global_rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _make_directory(run_dir: Path) -> str:
    for left_over in run_dir.glob(f"{_PREFIX}*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    return tempfile.mkdtemp(prefix=_PREFIX, dir=run_dir)


def _encode_together(
    rows: Sequence[Any], encode: Encode, bad: BadRows, *, directory: Path, topology: Topology
) -> Examples:
    """As `encode_alone`: the bad rows are those of all shares, and an error is that of the first row that has one."""
    size, global_rank = topology.world_size, topology.global_rank
    share = rows[len(rows) * global_rank // size : len(rows) * (global_rank + 1) // size]

    def encode_share() -> Counter[str]:
        mine = bad.copy_empty()
        _write(directory / f"{global_rank}.npz", encode(share, mine))
        return mine.counts

    for counts in run_on_all(topology, encode_share):
        bad.counts.update(counts)
    parts: list[Examples] = []
    run_on_all(topology, lambda: parts.extend(_read(directory / f"{number}.npz") for number in range(size)))
    return concatenate_examples(parts)


def _write(path: Path, examples: Examples) -> None:
    arrays = {name: getattr(examples, name) for name in _ARRAYS}
    np.savez(path, **arrays, has_slots=np.bool_(examples.has_slots))


def _read(path: Path) -> Examples:
    with np.load(path, allow_pickle=False) as file:
        return Examples(**{name: file[name] for name in _ARRAYS}, has_slots=bool(file["has_slots"]))
