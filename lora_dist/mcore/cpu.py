"""Stand-ins for the few CUDA calls megatron-core makes on its way, so that the same code runs on CPU with gloo."""

import types
from typing import Any

import torch


class _TorchOnCpu(types.ModuleType):
    """`torch` for one module, whose factory functions read `device="cuda"` as the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)


def use_cpu_stand_ins() -> None:
    """Redirect Megatron's CUDA calls to the CPU for the rest of this process; calling it again changes nothing."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda tensor, *args, **options: tensor
    mcore_random._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    schedules.torch = _TorchOnCpu("torch")
