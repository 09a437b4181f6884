"""Tells apart, on a CPU, what a GPU run would hold on the GPU from what it would hold on the host.

Both are CPU tensors here: what is asked for on `LABELLED`, and what is computed from it, counts as the GPU's.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from operations import identify_storage, note_waits
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.plan.tensors import find_tensors

LABELLED = torch.device("cpu", 0)
"""Stands for the GPU: torch computes on it as on `cpu`, and hands it on as it was asked for."""

_HOST = torch.device("cpu")
_aten = torch.ops.aten
_MAY_MIX = {_aten.copy_.default, _aten._to_copy.default, _aten.set_.source_Storage}
_GETS_DEVICE = torch.Tensor.device.__get__
_RUNS_BACKWARD = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_TAKES_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


@contextmanager
def label_devices() -> Iterator[Counter[str]]:
    """AssertionError within where an operation or a collective mixes the two, as it would on a GPU.

    For use in a process that does nothing else: DeepSpeed's accelerator becomes `LABELLED`. Counts, by operation, what
    is copied from the one to the other.
    """
    accelerator = get_accelerator()
    accelerator.device_name = accelerator.current_device_name = lambda *_: str(LABELLED)
    type(accelerator).FloatTensor = property(lambda _: partial(torch.tensor, dtype=torch.float32, device=LABELLED))
    distributed_c10d._get_object_coll_device = lambda _group=None: LABELLED
    places = _Places()
    with note_waits() as is_waiting, _Operations(places, is_waiting), _Functions(places):
        yield places.crossings


class _Places:
    """Which storages are the GPU's; all others are the host's."""

    def __init__(self) -> None:
        self._on_gpu: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._calls = [True]
        self.crossings: Counter[str] = Counter()

    @contextmanager
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Within a call from Python. What torch makes in it without being told a device is where its arguments are."""
        runs_backward = func in _RUNS_BACKWARD
        follows = not _names_host(kwargs.get("device")) and any(map(self.has, find_tensors((args, kwargs))))
        self._calls.append(runs_backward or follows)
        try:
            yield
        finally:
            self._calls.pop()

    @property
    def default_on_gpu(self) -> bool:
        return self._calls[-1]

    def has(self, tensor: torch.Tensor) -> bool:
        return identify_storage(tensor) in self._on_gpu

    def put(self, tensor: torch.Tensor, *, on_gpu: bool) -> None:
        key = identify_storage(tensor)
        self._on_gpu.pop(key, None)
        if on_gpu:
            self._on_gpu[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._on_gpu.pop(key, None))


class _Functions(TorchFunctionMode):
    """What the dispatcher is not told: a tensor's device, moves that change nothing here, values from Python."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):  # handed on by another mode
            return func(*args, **kwargs)
        if func == _GETS_DEVICE:
            device = func(*args)
            return LABELLED if device == _HOST and self._places.has(args[0]) else device
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._move(*args, **kwargs) if func is torch.Tensor.to else self._move(args[0], _HOST)
        with self._places.call(func, args, kwargs):
            result = func(*args, **kwargs)
        if func in _TAKES_VALUES:
            on_gpu = _is_labelled(kwargs.get("device"))
            self._places.crossings[func.__name__] += on_gpu
            self._places.put(result, on_gpu=on_gpu)
        elif func is torch.Tensor.new_tensor:
            self._places.put(result, on_gpu=self._places.has(args[0]))
        return result

    def _move(self, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Copies where the two devices differ, and nowhere else; torch sees but one."""
        if args and isinstance(args[0], torch.Tensor):
            args = LABELLED if self._places.has(args[0]) else args[0].device, args[0].dtype, *args[1:]
        named = [torch.device(one) for one in (*args, *kwargs.values()) if isinstance(one, str | torch.device)]
        was_on_gpu = self._places.has(source)
        on_gpu = named[0] == LABELLED if named else was_on_gpu
        args = tuple(_HOST if _is_labelled(one) else one for one in args)
        kwargs = {key: _HOST if _is_labelled(one) else one for key, one in kwargs.items()}
        result = source.to(*args, **kwargs)
        if on_gpu != was_on_gpu and identify_storage(result) == identify_storage(source):
            result = result.clone()
        self._places.crossings["to"] += on_gpu != was_on_gpu
        self._places.put(result, on_gpu=on_gpu)
        return result


class _Operations(TorchDispatchMode):
    """Checks the arguments of each operation, and notes where its results are."""

    def __init__(self, places: _Places, is_waiting: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places, self._is_waiting = places, is_waiting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_waiting():
            return func(*args, **kwargs)
        tensors = find_tensors((args, kwargs))
        places = {self._places.has(one) for one in tensors if one.ndim > 0} or {
            any(self._places.has(one) for one in tensors)
        }
        assert len(places) == 1 or func in _MAY_MIX, f"{func} mixes tensors of the GPU and of the host"
        device = kwargs.get("device")
        follows = self._places.default_on_gpu if device is not None else True in places
        on_gpu = follows or _is_labelled(device)
        assert func.namespace != "c10d" or places == {True}, f"{func} gets tensors of the host, which NCCL refuses"
        if func is _aten.copy_.default and self._places.has(args[0]) != self._places.has(args[1]):
            self._places.crossings["copy_"] += 1
        known = {identify_storage(one) for one in tensors}
        out = func(*args, **kwargs)
        for one in find_tensors(out):
            if identify_storage(one) not in known:
                self._places.put(one, on_gpu=on_gpu)
        return out


def _is_labelled(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device) == LABELLED


def _names_host(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device) == _HOST
