"""Makes a torch without CUDA see GPUs: the device of pretend_gpu.cpp behind the names that torch.cuda has for it.

For a process that does nothing else. Streams and events are one queue: what is launched has run.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before there is a CUDA to see: else it looks for libraries of CUDA's.
import bitsandbytes  # noqa: F401
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils import cpp_extension

NUM_DEVICES = 8
MEMORY_BYTES = 80 * 2**30
SOURCE = Path(__file__).with_name("pretend_gpu.cpp")
_capability = (9, 0)


def set_capability(major: int, minor: int) -> None:
    global _capability
    _capability = (major, minor)


def install() -> Any:
    """The device's own functions (pretend_gpu.cpp). Compiles them once for all processes, about a minute."""
    device = cpp_extension.load("lora_dist_pretend_gpu", [str(SOURCE)], extra_cflags=["-O1", "-w"])
    device.set_num_devices(NUM_DEVICES)
    torch.version.cuda = "13.0"
    for name, value in (_describe_c_functions(device) | {"_cuda_isInBadFork": False}).items():
        setattr(torch._C, name, value)
    for name, value in {**_describe_device(device), **_describe_memory(device), **_describe_queue(device)}.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    torch.Tensor.record_stream = lambda _tensor, _stream: None
    _set_generators(device.default_generator())
    _set_nccl(device.pretend_nccl)
    return device


def _describe_c_functions(device: Any) -> dict[str, Any]:
    def exchange(index: int) -> int:
        before = device.current_device()
        device.set_device(index if index >= 0 else before)
        return before

    return {
        "_cuda_getDevice": device.current_device,
        "_cuda_setDevice": device.set_device,
        "_cuda_getDeviceCount": lambda: NUM_DEVICES,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_synchronize": lambda: None,
        "_cuda_getCurrentRawStream": lambda _index: 0,
    }


def _describe_device(device: Any) -> dict[str, Any]:
    def describe(_device: Any = None) -> SimpleNamespace:
        major, minor = _capability
        return SimpleNamespace(name="pretended", major=major, minor=minor, total_memory=MEMORY_BYTES)

    return {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": device.current_device,
        "get_device_properties": describe,
        "get_device_name": lambda _device=None: describe().name,
        "get_device_capability": lambda _device=None: _capability,
        "get_arch_list": lambda: ["sm_70", "sm_80", "sm_90"],
        "is_bf16_supported": lambda *_, **__: _capability >= (8, 0),
    }


def _describe_memory(device: Any) -> dict[str, Any]:
    def reset(_device: Any = None) -> None:
        device.reset_peak()

    return {
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda _device=None: device.allocated()),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda _device=None: device.max_allocated()),
        **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"), reset),
        "set_per_process_memory_fraction": lambda part, _device=None: device.set_limit(int(part * MEMORY_BYTES)),
        "memory_stats": lambda _device=None: {},
        "mem_get_info": lambda _device=None: (MEMORY_BYTES - device.allocated(), MEMORY_BYTES),
        "empty_cache": lambda: None,
    }


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._time_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        assert self._time_s is not None, "not recorded"
        assert end._time_s is not None, "its end was not recorded"
        return (end._time_s - self._time_s) * 1e3


class Stream:
    """Also what torch.cuda.stream(...) gives."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


def _describe_queue(device: Any) -> dict[str, Any]:
    only = Stream()
    return {
        **{"Event": Event, "Stream": Stream, "stream": lambda _stream: only, "set_stream": lambda _stream: None},
        **dict.fromkeys(("current_stream", "default_stream"), lambda _device=None: only),
        "synchronize": lambda _device=None: None,
        "ipc_collect": lambda: None,
    }


def _set_generators(generator: torch.Generator) -> None:
    torch.cuda.default_generators = (generator,) * NUM_DEVICES
    for module in (torch.cuda, torch.cuda.random):
        module.manual_seed = module.manual_seed_all = generator.manual_seed
    torch.cuda.initial_seed = generator.initial_seed


def _set_nccl(wrap: Any) -> None:
    class IsNccl(type):
        def __instancecheck__(cls, one: Any) -> bool:
            return isinstance(one, torch._C._distributed_c10d.Backend) and one.name() == "nccl"

        def __call__(cls, store: dist.Store, rank: int, size: int, options: SimpleNamespace) -> Any:
            return wrap(dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout))

    class ProcessGroupNCCL(metaclass=IsNccl):
        Options = SimpleNamespace

    torch.cuda.nccl.version = lambda: (2, 28, 9)
    distributed_c10d._NCCL_AVAILABLE = True
    distributed_c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL
