"""Time, CPU time and throughput of each step, on this process's own clock; nothing is communicated."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lora_dist.measure.memory import PeakMemoryMeter
from lora_dist.topology import Topology

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and quartiles of one quantity over the timed steps."""

    median: float
    p25: float
    p75: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputSummary:
    """The steps after the warm-up. Tokens are the global batch's, rates are per process (per GPU)."""

    num_timed_steps: int
    num_warmup_steps: int
    """Steps left out; fewer than asked for only where the run had no more steps than that."""
    step_time_ms: Spread
    tokens_per_sec_per_gpu: Spread
    """Tokens that are not padding."""
    loss_tokens_per_sec_per_gpu: Spread
    """Target tokens."""
    cpu_seconds_per_step: Spread
    """CPU time of this process over all its threads: what a busy machine does not distort."""
    tokens_per_step: float
    """Median tokens of a global batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    seconds: float
    cpu_seconds: float
    num_tokens: int
    num_loss_tokens: int


class Meter:
    """Times steps: `with meter.step(...)` around each one, `last()` for its metrics, `summarize()` at the end."""

    def __init__(self, topology: Topology, *, num_warmup_steps: int, memory: PeakMemoryMeter | None = None) -> None:
        """`memory` measures since its own reset, so that building the model counts; default: from here on.

        The first step is warm-up whatever `num_warmup_steps`: it runs under instruments (`first_step`).
        """
        self._device, self._world_size = topology.device, topology.world_size
        self._num_warmup_steps = max(1, num_warmup_steps)
        self.memory = memory or PeakMemoryMeter(topology.device)
        self._steps: list[_Step] = []

    @contextmanager
    def step(self, *, num_tokens: int, num_loss_tokens: int) -> Iterator[None]:
        """Time one step of a global batch with that many tokens. A step that raises is not counted."""
        self._synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self._synchronize()
        self._steps.append(
            _Step(
                seconds=time.perf_counter() - started,
                cpu_seconds=time.process_time() - cpu_started,
                num_tokens=num_tokens,
                num_loss_tokens=num_loss_tokens,
            )
        )

    def last(self) -> dict[str, float | int]:
        """Metrics of the newest step, named as in metrics.jsonl; empty before the first."""
        if not self._steps:
            return {}
        step = self._steps[-1]
        return {
            "step_time_ms": step.seconds * 1e3,
            "tokens": step.num_tokens,
            "loss_tokens": step.num_loss_tokens,
            "tokens_per_sec_per_gpu": self._rate(step.num_tokens, step),
            "peak_memory_gib": self.memory.read_bytes() / GIB,
        }

    def summarize(self) -> ThroughputSummary | None:
        """Over the steps after the warm-up, at least the last one; None where no step ran (a finished run resumed)."""
        if not self._steps:
            return None
        num_warmup_steps = min(self._num_warmup_steps, len(self._steps) - 1)
        timed = self._steps[num_warmup_steps:]
        return ThroughputSummary(
            num_timed_steps=len(timed),
            num_warmup_steps=num_warmup_steps,
            step_time_ms=compute_spread([step.seconds * 1e3 for step in timed]),
            tokens_per_sec_per_gpu=compute_spread([self._rate(step.num_tokens, step) for step in timed]),
            loss_tokens_per_sec_per_gpu=compute_spread([self._rate(step.num_loss_tokens, step) for step in timed]),
            cpu_seconds_per_step=compute_spread([step.cpu_seconds for step in timed]),
            tokens_per_step=statistics.median(step.num_tokens for step in timed),
        )

    def _rate(self, num_tokens: int, step: _Step) -> float:
        return num_tokens / step.seconds / self._world_size

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def compute_spread(values: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation, the smallest and largest value included."""
    if len(values) == 1:
        return Spread(median=values[0], p25=values[0], p75=values[0])
    p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, p25=p25, p75=p75)
