"""Sees every operation of a step: the storages it makes, its FLOPs and seconds, and what collectives take."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_dist.plan.clock import ComputeClock
from lora_dist.plan.live_bytes import LOGITS, TRANSIENT, LiveBytes


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
            for tensor in _find_tensors(args):
                self._live.note_communication(tensor)
            return out
        for tensor in _find_tensors(out):
            has_vocab_columns = tensor.ndim > 1 and tensor.shape[-1] == self._num_vocab_rows
            self._live.see(tensor, LOGITS if has_vocab_columns else TRANSIENT)
        self._clock.add(func, args, kwargs, out)
        return out


def _find_tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
