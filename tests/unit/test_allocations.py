"""The instrument that the plan's peaks are held against."""

import torch
from allocations import find_peaks
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def profile_work(*, keep: bool) -> tuple[int, int]:
    kept = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.zeros(3 * MIB, dtype=torch.uint8)
        second = torch.zeros(2 * MIB, dtype=torch.uint8)
        if keep:
            kept.append(second)
        del first, second
        last = torch.zeros(4 * MIB, dtype=torch.uint8)
        del last
    peaks = find_peaks(profiler)
    return peaks.own, peaks.all


def test_peak_is_of_what_is_held_at_once() -> None:
    assert profile_work(keep=False) == (5 * MIB, 5 * MIB)


def test_what_was_not_let_go_counts_in_one_peak_only() -> None:
    assert profile_work(keep=True) == (4 * MIB, 6 * MIB)
