"""Peak memory of this process since a chosen moment: CUDA's own counters, or the resident set size on CPU."""

import ctypes
import gc
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_INTERVAL_S = 0.005

LABELS = {"cuda": "CUDA allocated", "rss": "peak RSS", "rss_sampled": "peak RSS (sampled)"}
"""How reports name each way of measuring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """Bytes of one process between a reset and a reading."""

    method: str
    """cuda (torch's allocator), rss (the kernel's high-water mark) or rss_sampled (read every 5 ms: may miss peaks)."""
    peak_bytes: int
    """Largest allocated bytes on the GPU, or largest resident set size."""
    reserved_bytes: int | None
    """Largest bytes that torch's CUDA allocator held; None on CPU."""
    at_reset_bytes: int
    """Bytes already in use at the reset: on CPU the interpreter and its libraries."""


class PeakMemoryMeter:
    """Measures from construction, or from the last `reset`, which starts anew for the next run in this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _RssSampler | None = None
        self._method = "cuda"
        self._at_reset_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Give freed memory back to the system and forget the peak so far."""
        self.close()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._at_reset_bytes = torch.cuda.memory_allocated(self._device)
            return
        _trim_heap()
        if reset_rss_peak():
            self._method = "rss"
        else:
            self._method, self._sampler = "rss_sampled", _RssSampler()
        self._at_reset_bytes = read_rss_bytes("VmRSS")

    def read_bytes(self) -> int:
        """The peak so far; cheap enough for every step."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return read_rss_bytes("VmHWM") if self._sampler is None else self._sampler.read_peak_bytes()

    def read(self) -> PeakMemory:
        on_gpu = self._device.type == "cuda"
        return PeakMemory(
            method=self._method,
            peak_bytes=self.read_bytes(),
            reserved_bytes=int(torch.cuda.max_memory_reserved(self._device)) if on_gpu else None,
            at_reset_bytes=self._at_reset_bytes,
        )

    def close(self) -> None:
        """End the sampling thread where there is one."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


def reset_rss_peak() -> bool:
    """Make the kernel forget VmHWM; False where it does not allow that (some containers)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return read_rss_bytes("VmHWM") <= read_rss_bytes("VmRSS") * 1.05


def read_rss_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {field}"
    return int(match[1]) * 1024


def _trim_heap() -> None:
    """Return the C heap's free pages, or what the run before freed would still count as resident."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if malloc_trim is not None:
        malloc_trim(0)


class _RssSampler:
    """A thread that reads the resident set size again and again, for systems that cannot reset its high-water mark."""

    def __init__(self) -> None:
        self._peak_bytes = read_rss_bytes("VmRSS")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_INTERVAL_S):
            self._peak_bytes = max(self._peak_bytes, read_rss_bytes("VmRSS"))

    def read_peak_bytes(self) -> int:
        self._peak_bytes = max(self._peak_bytes, read_rss_bytes("VmRSS"))
        return self._peak_bytes

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
