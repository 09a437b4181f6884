"""A pipeline in its steady state repeats itself: a few microbatches are executed, the others counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lora_dist.batch import Batch
from lora_dist.measure.collectives import Collective

_NUM_STEADY = 3
"""Executed beyond the warm-up: the first makes the gradients, the next two must be alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a process has done so far."""

    flops: int
    seconds: float
    """Computing only."""
    collectives: Counter[Collective] = field(default_factory=Counter)
    """Calls by kind, each key with count 1."""

    def since(self, earlier: "Work") -> "Work":
        return Work(
            flops=self.flops - earlier.flops,
            seconds=self.seconds - earlier.seconds,
            collectives=self.collectives - earlier.collectives,
        )

    def plus(self, more: "Work", times: int) -> "Work":
        collectives = Counter(self.collectives)
        for kind, count in more.collectives.items():
            collectives[kind] += times * count
        return Work(
            flops=self.flops + times * more.flops,
            seconds=self.seconds + times * more.seconds,
            collectives=collectives,
        )

    def list_collectives(self) -> list[Collective]:
        return sorted(replace(kind, count=count) for kind, count in self.collectives.items())


def count_calls(collectives: Sequence[Collective]) -> Counter[Collective]:
    """Keys with count 1, so that two readings can be subtracted."""
    calls: Counter[Collective] = Counter()
    for one in collectives:
        calls[replace(one, count=1)] += one.count
    return calls


def compute_num_warmup(pp_rank: int, pp_size: int) -> int:
    """Forward passes before this stage's first backward in 1F1B."""
    return pp_size - pp_rank - 1


def compute_num_executed(pp_rank: int, pp_size: int, num_microbatches: int) -> int:
    return min(num_microbatches, compute_num_warmup(pp_rank, pp_size) + _NUM_STEADY)


class WatchedBatches(Sequence[Batch]):
    """Microbatches that note the work done so far whenever the schedule takes one."""

    def __init__(self, batches: Sequence[Batch], read_work: Callable[[], Work]) -> None:
        self._batches, self._read_work = batches, read_work
        self.readings: list[Work] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.readings.append(self._read_work())
            yield batch

    def compute_steady(self, num_warmup: int) -> Work | None:
        """Work from one microbatch's arrival to the next's in the steady state; None where too few came.

        AssertionError where the last two differ: then the pipeline does not repeat itself.
        """
        if len(self.readings) < num_warmup + _NUM_STEADY:
            return None
        before, between, after = self.readings[-3:]
        steady = after.since(between)
        earlier = between.since(before)
        assert (earlier.flops, earlier.collectives) == (steady.flops, steady.collectives)
        return steady
