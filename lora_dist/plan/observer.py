"""Sees every operation of a step: the storages it makes, its FLOPs and seconds, and what collectives take."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.plan.clock import ComputeClock
from lora_dist.plan.live_bytes import LOGITS, TRANSIENT, LiveBytes
from lora_dist.plan.tensors import find_tensors


class Observer(TorchDispatchMode):
    """Works on fake tensors and on real ones, which a test compares."""

    def __init__(self, live: LiveBytes, clock: ComputeClock, num_vocab_rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live, self._clock, self._num_vocab_rows = live, clock, num_vocab_rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            for tensor in find_tensors(args):
                self._live.note_communication(tensor)
            return out
        for tensor in find_tensors(out):
            has_vocab_columns = tensor.ndim > 1 and tensor.shape[-1] == self._num_vocab_rows
            self._live.see(tensor, LOGITS if has_vocab_columns else TRANSIENT)
        self._clock.add(func, args, kwargs, out)
        return out
