"""What torch's CPU allocator handed out during a profile: its peak, with and without what other threads let go."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.profiler import profile


@dataclass
class Peaks:
    """Bytes above those held when the profile began."""

    own: int
    """Of blocks that this thread was seen to let go. Another thread (gloo's) does so when it comes to it, and a profile
    may miss that it did."""
    all: int

    def __add__(self, held_bytes: int) -> "Peaks":
        return Peaks(own=self.own + held_bytes, all=self.all + held_bytes)


@dataclass
class _Block:
    size: int
    start_ns: int | None
    """None: handed out before the profile began."""
    end_ns: int | None = None
    let_go_here: bool = False


def find_peaks(profiler: profile) -> Peaks:
    """Peaks of a finished profile with `profile_memory=True`, seen from the thread that opened it."""
    assert profiler.profiler is not None
    events = list(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    blocks = _pair(sorted((e for e in events if e.name == "[memory]"), key=lambda e: e.start_time_ns))
    return Peaks(own=_find_peak([b for b in blocks if b.let_go_here]), all=_find_peak(blocks))


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def _pair(events: list[Any]) -> list[_Block]:
    """A block for each thing handed out or got back. Nearly all of a step's events are those of its own thread."""
    [(this_thread, _)] = Counter(event.start_tid for event in events).most_common(1)
    held: dict[int, _Block] = {}
    ended = []
    for event in events:
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            held[pointer] = _Block(size, event.start_time_ns)
            continue
        block = held.pop(pointer, _Block(-size, None))
        block.end_ns = event.start_time_ns
        block.let_go_here = event.start_tid == this_thread
        ended.append(block)
    return [*ended, *held.values()]


def _find_peak(blocks: list[_Block]) -> int:
    changes = [(block.start_ns, block.size) for block in blocks if block.start_ns is not None]
    changes += [(block.end_ns, -block.size) for block in blocks if block.end_ns is not None]
    total = peak = 0
    for _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    return peak
