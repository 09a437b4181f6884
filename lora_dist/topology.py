"""Sizes -> coordinates -> process groups and device: where this process stands. Passed on, never global."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from lora_dist.row_shard import RowShard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By their names in configurations."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """One process's place in the grid; TP varies fastest so that a TP group stays within a node."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


def compute_coordinates(global_rank: int, *, tp_size: int, cp_size: int, dp_size: int) -> Coordinates:
    """Place of `global_rank` in the order TP, CP, DP, PP (innermost first), Megatron's own."""
    rest, tp_rank = divmod(global_rank, tp_size)
    rest, cp_rank = divmod(rest, cp_size)
    pp_rank, dp_rank = divmod(rest, dp_size)
    return Coordinates(tp_rank=tp_rank, cp_rank=cp_rank, dp_rank=dp_rank, pp_rank=pp_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This process's ranks, groups and device."""

    world_size: int
    global_rank: int
    local_rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    """Which rows of a batch are this process's, with the others of its replica."""
    sequence_parallel: bool
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    zero_group: dist.ProcessGroup
    """The DP x CP processes that have these very parameters, each gradients of its own tokens: what ZeRO partitions
    over."""
    model_parallel_group: dist.ProcessGroup
    """The TP x PP processes that hold the model once."""
    embedding_group: dist.ProcessGroup | None
    """First and last pipeline stage with this tp_rank; None on the others and where pp_size is 1."""

    @property
    def zero_size(self) -> int:
        return self.dp_size * self.cp_size

    @property
    def zero_rank(self) -> int:
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def row_shard(self) -> RowShard:
        """What this process has of each row of its replica."""
        return RowShard(cp_size=self.cp_size, cp_rank=self.cp_rank)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def __str__(self) -> str:
        return (
            f"tp {self.tp_rank}/{self.tp_size} cp {self.cp_rank}/{self.cp_size} pp {self.pp_rank}/{self.pp_size}"
            f" dp {self.dp_rank}/{self.dp_size}"
            f" sp {'on' if self.sequence_parallel else 'off'}"
            f" global_rank {self.global_rank}/{self.world_size} {self.device}"
        )


def get_world_size() -> int:
    """Processes of this job as torchrun, srun or a DeepSpeed launcher announced them; 1 when started bare."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(requested: str, local_rank: int) -> torch.device:
    """`auto` takes a GPU where there is one. ValueError when `cuda` is asked for and there is none."""
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"device={requested}: local_rank {local_rank} has no GPU of its own among {num_gpus}; use device=cpu"
        )
    return torch.device("cuda", local_rank)


def check_device(device: torch.device, dtype: str) -> None:
    """ValueError where this GPU, or the installed torch, cannot compute in `dtype`."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if not any(_runs_on(architecture, major, minor) for architecture in architectures):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, but torch"
            f" {torch.__version__} was built for {', '.join(architectures)}; install a build that has it (V100: cu126)"
        )
    # torch.cuda.is_bf16_supported() counts emulation and says True on a V100.
    if dtype == "bf16" and major < 8:
        raise ValueError(f"dtype=bf16 needs compute capability 8.0, this GPU has {major}.{minor}; use dtype=fp16")


def check_cuda_graphs(device: torch.device) -> None:
    """ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=true needs a GPU, and this run is on the {device.type}; leave it out")


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Binaries (`sm_70`) run on the same major version from their minor one up; `compute_90` is compiled on loading."""
    kind, _, number = architecture.partition("_")
    digits = "".join(filter(str.isdigit, number))
    built = int(digits[:-1]), int(digits[-1])
    return built <= (major, minor) if kind == "compute" else built[0] == major and built[1] <= minor


def run_on_first(topology: Topology, action: Callable[[], _Result]) -> _Result:
    """What `action` returns on global rank 0, told to every process. Collective.

    A ValueError or OSError of it is raised on all of them, so that nobody waits for a process that has given up.
    """
    told = [_attempt(action) if topology.global_rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], ValueError | OSError):
        raise told[0]
    return told[0]  # type: ignore[return-value]


def run_on_all(topology: Topology, action: Callable[[], _Result]) -> list[_Result]:
    """What `action` returns on every process, by global rank. Collective.

    Where it has a ValueError or OSError on some, that of the first of them is raised on all.
    """
    told: list[_Result | ValueError | OSError | None] = [None] * topology.world_size
    dist.all_gather_object(told, _attempt(action))
    for result in told:
        if isinstance(result, ValueError | OSError):
            raise result
    return told  # type: ignore[return-value]


def _attempt(action: Callable[[], _Result]) -> _Result | ValueError | OSError:
    """What it returns, or its error in a form that can be told."""
    try:
        return action()
    except (ValueError, OSError) as error:
        return (ValueError if isinstance(error, ValueError) else OSError)(str(error))
