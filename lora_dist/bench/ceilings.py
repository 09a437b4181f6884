"""What the device itself can do, measured between the contenders' steps: one matrix product and one copy."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_dist.config import RunConfig

_MIN_SECONDS = 0.1
_COPY_BYTES = 2**28
_CALLS_A_READING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CeilingSample:
    """Rates over CPU time on CPU, over wall time on a GPU."""

    gemm_flops_per_second: float
    copy_bytes_per_second: float
    """Bytes read plus bytes written."""


class Ceilings:
    """The largest frozen product of a layer at this batch, [tokens, hidden] x [hidden, ffn], and a long copy."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        num_tokens = config.loop.micro_batch_size * config.data.seq_len
        hidden, ffn = config.model.hidden_size, config.model.ffn_hidden_size
        self._device = device
        self._left = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
        self._right = torch.randn(ffn, hidden, device=device, dtype=dtype)
        self._product = torch.empty(num_tokens, ffn, device=device, dtype=dtype)
        self._source = torch.ones(_COPY_BYTES, device=device, dtype=torch.uint8)
        self._target = torch.empty_like(self._source)
        self._flops = 2 * num_tokens * hidden * ffn

    def measure(self) -> CeilingSample:
        return CeilingSample(
            gemm_flops_per_second=self._flops * self._count_per_second(self._multiply),
            copy_bytes_per_second=2 * _COPY_BYTES * self._count_per_second(self._copy),
        )

    def _multiply(self) -> None:
        torch.mm(self._left, self._right.t(), out=self._product)

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _count_per_second(self, work: Callable[[], None]) -> float:
        work()
        started, count = self._read_clock(), 0
        while (elapsed := self._read_clock() - started) < _MIN_SECONDS:
            for _ in range(_CALLS_A_READING):  # on a GPU a reading waits for the device
                work()
            count += _CALLS_A_READING
        return count / elapsed

    def _read_clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()
