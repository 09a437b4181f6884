"""Fake tensors: every tensor that is made within has a shape, strides and a storage of its own, but no memory.

They are torch's meta tensors, whatever device they are asked for. torch's FakeTensorMode would remember that device as
well, and take several times as long; here no code asks again.
"""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.plan.tensors import find_tensors

_aten = torch.ops.aten
_META = torch.device("meta")
_RESHAPING = {"resize_", "resize_as_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_"}
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class MetaTensors(TorchDispatchMode):
    """The last mode to see an operation. Remembers what each makes of arguments of the same layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: dict[Hashable, list[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.lift_fresh.default:
            return torch.empty_like(args[0], device=_META)
        if _overwrites_first(func):
            return args[0]
        if func is _aten._to_copy.default and _changes_device_only(args[0], kwargs):
            return args[0].detach()
        if _takes_device(func) and (kwargs.get("device") is not None or not _takes_tensor(func)):
            kwargs = {**kwargs, "device": _META, "pin_memory": False}
        return self._compute(func, args, kwargs) if _is_pure(func) else func(*args, **kwargs)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (func, _freeze(args), _freeze(tuple(kwargs.items())))
        known = self._results.get(key)
        if known is not None:
            made = [_make(one) if isinstance(one, tuple) else one for one in known]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if _are_new(outputs, args):
            self._results[key] = [_describe(one) if isinstance(one, torch.Tensor) else one for one in outputs]
        return result


def _freeze(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return _describe(value)
    if isinstance(value, tuple | list):
        return tuple(map(_freeze, value))
    return type(value), value


def _describe(tensor: torch.Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _make(layout: _Layout) -> torch.Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device=_META)


def _are_new(outputs: Sequence[Any], inputs: Any) -> bool:
    """True where each output has a storage of its own and the others are plain numbers."""
    if not all(isinstance(one, torch.Tensor | int | float | None) for one in outputs):
        return False
    tensors = find_tensors((outputs, inputs))
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    made = [one.untyped_storage()._cdata for one in outputs if isinstance(one, torch.Tensor)]
    return all(storages.count(storage) == 1 for storage in made)


def _changes_device_only(tensor: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype") in (None, tensor.dtype) and kwargs.get("memory_format") is None


@cache
def _overwrites_first(func: Any) -> bool:
    """In-place operators that leave the layout alone: there is nothing to compute."""
    name = func._overloadpacket.__name__
    arguments = func._schema.arguments
    writes = bool(arguments) and arguments[0].is_write and str(arguments[0].type) == "Tensor"
    return func.namespace == "aten" and name.endswith("_") and name not in _RESHAPING and writes


@cache
def _is_pure(func: Any) -> bool:
    return func.namespace == "aten" and not func.is_view and not func._schema.is_mutable


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@cache
def _takes_tensor(func: Any) -> bool:
    return any("Tensor" in str(argument.type) for argument in func._schema.arguments)
