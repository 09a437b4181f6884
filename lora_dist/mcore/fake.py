"""One process of any topology alone on this machine: a process group that sends nothing, for fake tensors."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import random as mcore_random
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_dist.config import TopologyConfig
from lora_dist.mcore.parallel import build_topology
from lora_dist.topology import Topology


@contextlib.contextmanager
def open_fake_topology(config: TopologyConfig, *, world_size: int, global_rank: int) -> Iterator[Topology]:
    """Stand where `global_rank` of `world_size` processes would; collectives return at once and change nothing.

    Random states are real tensors, which fake ones cannot be mixed with, so none is kept or restored: for use in a
    process that does nothing else.
    """
    mcore_random.CudaRNGStatesTracker.add = lambda tracker, name, seed: None
    mcore_random.CudaRNGStatesTracker.fork = lambda tracker, name="": contextlib.nullcontext()
    mcore_random._get_all_rng_states = lambda: ()
    mcore_random._set_all_rng_states = lambda: None
    mcore_random._fork_rng = contextlib.nullcontext
    dist.init_process_group("fake", store=FakeStore(), rank=global_rank, world_size=world_size)
    try:
        yield build_topology(config, device=torch.device("cpu"), local_rank=0, seed=0)
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()
