"""Process groups: torch.distributed and Megatron's model-parallel state opened and closed around one run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from lora_dist.config import TopologyConfig, compute_dp_size
from lora_dist.lora.factors import derive_seed
from lora_dist.mcore.cpu import use_cpu_stand_ins
from lora_dist.stopping import Stopped
from lora_dist.topology import Topology, compute_coordinates


@contextmanager
def open_topology(config: TopologyConfig, *, device: torch.device, local_rank: int, seed: int) -> Iterator[Topology]:
    """Join the processes the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and lay out the grid.

    On a failure nothing collective is issued: gloo's groups are dropped without a barrier, NCCL's left to the end of
    the process. Taking those down waits for all of their processes, and one that fails alone could not say so.
    """
    joined_here, is_well = not dist.is_initialized(), False
    if joined_here:
        _join(device, timeout_s=config.timeout_s)
    try:
        yield build_topology(config, device=device, local_rank=local_rank, seed=seed)
        is_well = True
    except Stopped:  # which is raised on every process
        is_well = True
        raise
    finally:
        ps.destroy_model_parallel()
        if joined_here and (is_well or device.type == "cpu"):
            dist.destroy_process_group()


def _join(device: torch.device, timeout_s: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def seed_base_dropout(topology: Topology, *, seed: int, step: int) -> None:
    """Make the base's dropouts of one step a function of the run's seed, so that a resumed run draws the same ones.

    Regions that TP splits get a generator of their own on each TP rank, the others one that TP ranks share.
    """
    parts = derive_seed(seed, "base dropout", step, topology.zero_rank, topology.pp_rank)
    model_parallel_cuda_manual_seed(parts % 2**31)


@contextmanager
def leave_generators_alone() -> Iterator[None]:
    """For a base that drops nothing: Megatron switches generators all the same, which CUDA refuses in a recording."""
    tracker = get_cuda_rng_tracker()
    tracker.fork = lambda *_: nullcontext()
    try:
        yield
    finally:
        del tracker.fork  # the class's own again


def build_topology(config: TopologyConfig, *, device: torch.device, local_rank: int, seed: int) -> Topology:
    """Megatron's groups over the processes that torch.distributed already joined, and this process's place."""
    if device.type == "cpu":
        use_cpu_stand_ins(device)
    world_size = dist.get_world_size()
    dp_size = compute_dp_size(config, world_size)
    ps.initialize_model_parallel(
        config.tp_size, config.pp_size, context_parallel_size=config.cp_size, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(seed)
    global_rank = dist.get_rank()
    place = compute_coordinates(global_rank, tp_size=config.tp_size, cp_size=config.cp_size, dp_size=dp_size)
    assert place.tp_rank == ps.get_tensor_model_parallel_rank()
    assert place.cp_rank == ps.get_context_parallel_rank()
    assert place.pp_rank == ps.get_pipeline_model_parallel_rank()
    assert place.dp_rank == ps.get_data_parallel_rank()
    on_edge = config.pp_size > 1 and place.pp_rank in (0, config.pp_size - 1)
    return Topology(
        world_size=world_size,
        global_rank=global_rank,
        local_rank=local_rank,
        tp_size=config.tp_size,
        tp_rank=place.tp_rank,
        pp_size=config.pp_size,
        pp_rank=place.pp_rank,
        cp_size=config.cp_size,
        cp_rank=place.cp_rank,
        dp_size=dp_size,
        dp_rank=place.dp_rank,
        sequence_parallel=config.sequence_parallel and config.tp_size > 1,
        device=device,
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        zero_group=ps.get_data_parallel_group(with_context_parallel=True),
        model_parallel_group=ps.get_model_parallel_group(),
        embedding_group=ps.get_embedding_group() if on_edge else None,
    )
