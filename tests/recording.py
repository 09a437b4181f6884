"""Records what a function does to CPU tensors and does it again, as a CUDA graph would: no Python runs in between.

A replay calls the recorded operations on the recorded tensors. What Python computed on the way, which tensors it chose
and which numbers it passed, is as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from operations import DEVICE_WAITS, identify_storage, note_waits
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.plan.tensors import find_tensors

_Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class CpuRecorder:
    """`lora_dist.mcore.graphs.Record`; counts its recordings and their replays."""

    def __init__(self) -> None:
        self.num_records = self.num_replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_records += 1
        with note_waits() as is_waiting:
            recording = _Recording(is_waiting)
            with recording.undone(), recording:
                run()

        def replay() -> None:
            self.num_replays += 1
            recording.replay()

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self, is_waiting: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_waiting = is_waiting
        self._operations: list[_Operation] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A recording does nothing: what was there before is put back as it was."""
        yield
        for tensor, before in self._before.values():
            tensor.copy_(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_waiting():  # belongs to the collective, which a replay issues and waits for
            return func(*args, **kwargs)
        assert func not in DEVICE_WAITS, f"{func} waits for the device within a recording"
        for tensor in _list_written(func, args, kwargs):
            self._keep(tensor)
        out = func(*args, **kwargs)
        known = {identify_storage(one) for one in find_tensors((args, kwargs))}
        self._made |= {identify_storage(one) for one in find_tensors(out)} - known
        self._operations.append((func, args, kwargs, out))
        return out

    def _keep(self, tensor: torch.Tensor) -> None:
        key = identify_storage(tensor)
        if key not in self._made and key not in self._before:
            whole = tensor.new_empty(0).set_(tensor.untyped_storage())
            self._before[key] = whole, whole.clone()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._operations:
                again = func(*args, **kwargs)
                if func.namespace == "c10d":
                    again[-1].wait()
                elif not func.is_view:
                    _write_over(out, again)


def _write_over(out: Any, again: Any) -> None:
    """The results of a replay stand where those of the recording did."""
    for old, new in zip(find_tensors(out), find_tensors(again), strict=True):
        if identify_storage(old) != identify_storage(new):
            old.copy_(new)


def _list_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    if func.namespace == "c10d":
        return find_tensors(args)
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [named[one.name] for one in func._schema.arguments if one.is_write and one.name in named]
    return find_tensors(written)
