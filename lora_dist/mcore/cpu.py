"""Stand-ins for the few CUDA calls megatron-core makes on its way, so that the same code runs on CPU with gloo."""

import types
from typing import Any

import torch


class _TorchOnCpu(types.ModuleType):
    """`torch` for one module, whose factory functions read `device="cuda"` as a CPU's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("torch")
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=self._device, **options)


def use_cpu_stand_ins(device: torch.device) -> None:
    """Redirect Megatron's CUDA calls to a CPU for the rest of this process; calling it again changes nothing."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.current_device = lambda: device
    torch.cuda.synchronize = lambda *args, **options: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda tensor, *args, **options: tensor.to(device)
    mcore_random._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *args, **options: torch.get_rng_state()
    schedules.torch = _TorchOnCpu(device)
