"""This project's contenders: the engine that training uses, on one process."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from lora_dist.batch import Batch
from lora_dist.config import RunConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.hf_weights import write_hf_checkpoint
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.run import build_engine
from lora_dist.topology import DTYPES, Topology


class OurContender:
    """`config.method` on the weights of `config.model.checkpoint`, drawn from the seed where that is None."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._engine, _ = build_engine(config, open_single_topology(config, device))
        self._lr = config.optim.lr

    def step(self, batches: Sequence[Batch], step: int) -> float:
        return self._engine.train_step(batches, step=step, lr=self._lr).loss

    def run_as_written(self) -> None:
        self._engine.run_as_written()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        parameters: Iterator[torch.nn.Parameter] = self._engine.gpt.parameters()
        return parameters


def open_single_topology(config: RunConfig, device: torch.device) -> Topology:
    """A group of this process alone, for the rest of the process."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return build_topology(config.topology, device=device, local_rank=0, seed=config.loop.seed)


def write_start_weights(config: RunConfig, directory: str) -> None:
    """Weights drawn from the run's seed, in its dtype, as a Hugging Face directory, which every contender can load."""
    topology = open_single_topology(config, torch.device("cpu"))
    gpt = build_model(config.model, topology, dtype=DTYPES[config.dtype], clock=DropoutClock())
    initialize_base(gpt, config.model, config.loop.seed)
    write_hf_checkpoint(gpt, directory, model=config.model)
