"""CUDA graphs of pretend GPUs: a list of operations, run anew on the same tensors.

As on a GPU, nothing that is recorded takes place while it is recorded, and nothing may wait for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from operations import DEVICE_WAITS
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.plan.tensors import find_tensors

_aten = torch.ops.aten
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[_Call] = []

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, find_tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)


class graph(TorchDispatchMode):
    """Runs what it records, and puts back what that wrote in tensors from before."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = ""
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = cuda_graph
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not _waits(func, args, kwargs), f"CUDA error: operation not permitted when stream is capturing ({func})"
        self._keep_written(func, args)
        out = func(*args, **kwargs)
        results = find_tensors(out)
        if any(one.is_cuda for one in (*find_tensors((args, kwargs)), *results)):
            self._own |= {one.untyped_storage()._cdata for one in results} - self._before.keys()
            self._graph.calls.append((func, args, kwargs, results))
        return out

    def _keep_written(self, func: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for one in find_tensors(value):
                key = one.untyped_storage()._cdata
                if key not in self._own and key not in self._before:
                    whole = torch.empty(0, dtype=torch.uint8, device=one.device).set_(one.untyped_storage())
                    self._before[key] = whole, whole.clone()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        for whole, before in self._before.values():
            whole.copy_(before)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host gets something from the device, or the device from the host's memory; not for its numbers."""
    given = find_tensors((args, kwargs))
    if not any(one.is_cuda for one in given):
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda" and bool(given)
    goes_to_host = func is _aten._to_copy.default and str(kwargs.get("device")) == "cpu"
    from_host = any(not one.is_cuda and (one.ndim > 0 or func is _aten.copy_.default) for one in given)
    return func in DEVICE_WAITS or goes_to_host or from_host


def install() -> None:
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph
    torch.cuda.graph_pool_handle = object
