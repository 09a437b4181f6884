"""Meter and peak memory: what is counted, what is left out, and that a reset forgets."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_dist.measure import memory
from lora_dist.measure.memory import PeakMemoryMeter
from lora_dist.measure.meter import Meter, compute_spread

CPU = torch.device("cpu")
MIB = 2**20


def build_meter(num_warmup_steps: int = 1, world_size: int = 2) -> Meter:
    return Meter(SimpleNamespace(device=CPU, world_size=world_size), num_warmup_steps=num_warmup_steps)


def test_rates_are_per_process_and_warmup_is_left_out() -> None:
    meter = build_meter()
    for seconds in (0.2, 0.02, 0.02):
        with meter.step(num_tokens=100, num_loss_tokens=40):
            time.sleep(seconds)
    summary = meter.summarize()
    assert (summary.num_timed_steps, summary.num_warmup_steps, summary.tokens_per_step) == (2, 1, 100)
    assert 20 <= summary.step_time_ms.median < 150
    rates = summary.tokens_per_sec_per_gpu, summary.loss_tokens_per_sec_per_gpu
    assert rates[0].median == pytest.approx(100 / 2 / summary.step_time_ms.median * 1e3, rel=0.2)
    assert rates[1].median == pytest.approx(rates[0].median * 0.4)
    assert summary.cpu_seconds_per_step.median < 0.02  # sleeping costs no CPU time


def test_last_step_has_the_names_of_metrics_jsonl() -> None:
    meter = build_meter()
    assert meter.last() == {}
    with meter.step(num_tokens=100, num_loss_tokens=40):
        time.sleep(0.01)
    last = meter.last()
    assert set(last) == {"step_time_ms", "tokens", "loss_tokens", "tokens_per_sec_per_gpu", "peak_memory_gib"}
    assert last["tokens_per_sec_per_gpu"] == pytest.approx(100 / 2 / last["step_time_ms"] * 1e3)


def test_fewer_steps_than_warmup_still_report_the_last() -> None:
    meter = build_meter(num_warmup_steps=5)
    assert meter.summarize() is None
    for _ in range(2):
        with meter.step(num_tokens=1, num_loss_tokens=1):
            pass
    assert (meter.summarize().num_timed_steps, meter.summarize().num_warmup_steps) == (1, 1)


def test_a_step_that_raises_is_not_counted() -> None:
    meter = build_meter()
    with pytest.raises(FloatingPointError), meter.step(num_tokens=1, num_loss_tokens=1):
        raise FloatingPointError
    assert meter.last() == {}


def test_spread_equals_numpy() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 7.0]
    spread = compute_spread(values)
    assert [spread.p25, spread.median, spread.p75] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist())


@pytest.mark.parametrize("can_reset", [True, False])
def test_peak_memory_sees_a_freed_peak_and_reset_forgets_it(can_reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if can_reset and not memory.reset_rss_peak():
        pytest.skip("this system cannot reset VmHWM")
    if not can_reset:
        monkeypatch.setattr(memory, "reset_rss_peak", lambda: False)
    meter = PeakMemoryMeter(CPU)
    tensor = torch.ones(64 * MIB // 4)
    time.sleep(0.05)
    del tensor
    reading = meter.read()
    assert reading.method == ("rss" if can_reset else "rss_sampled")
    assert 60 * MIB < reading.peak_bytes - reading.at_reset_bytes < 90 * MIB
    assert reading.reserved_bytes is None
    meter.reset()
    assert meter.read().peak_bytes - meter.read().at_reset_bytes < 20 * MIB
    meter.close()
