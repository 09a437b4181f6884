"""This project's contenders: the engine that training uses, on one process."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from lora_dist.batch import Batch
from lora_dist.config import RunConfig
from lora_dist.engine import Engine
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.methods import apply_method
from lora_dist.topology import Topology
from lora_dist.zero.engine import build_zero_engine


class OurContender:
    """`config.method` on the weights of `config.model.checkpoint`."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert config.model.checkpoint is not None
        topology = open_single_topology(config, device)
        self._gpt = build_shard(config, topology, dtype)
        load_hf_checkpoint(self._gpt, config.model.checkpoint)
        trainable = apply_method(self._gpt, config).trainable
        zero = build_zero_engine(
            self._gpt,
            trainable,
            zero=config.zero,
            optim=config.optim,
            micro_batch_size=config.loop.micro_batch_size,
            dtype=dtype,
            topology=topology,
        )
        self._engine = Engine(self._gpt, zero, trainable, topology, seed=config.loop.seed)
        self._lr = config.optim.lr

    def step(self, batches: Sequence[Batch], step: int) -> float:
        return self._engine.train_step(batches, step=step, lr=self._lr).loss

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        parameters: Iterator[torch.nn.Parameter] = self._gpt.parameters()
        return parameters


def open_single_topology(config: RunConfig, device: torch.device) -> Topology:
    """A group of this process alone, for the rest of the process."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return build_topology(config.topology, device=device, local_rank=0, seed=config.loop.seed)


def build_shard(config: RunConfig, topology: Topology, dtype: torch.dtype) -> ShardedGpt:
    gpt = build_model(
        config.model,
        topology,
        dtype=dtype,
        clock=DropoutClock(),
        recompute=config.loop.recompute,
        num_recomputed=config.loop.recompute_layers,
    )
    gpt.label_smoothing = config.optim.label_smoothing
    return gpt


def write_start_weights(config: RunConfig, directory: str) -> None:
    """Weights drawn from the run's seed as a Hugging Face directory, which every contender can load."""
    topology = open_single_topology(config, torch.device("cpu"))
    gpt = build_shard(config, topology, torch.float32)
    initialize_base(gpt, config.model, config.loop.seed)
    write_hf_checkpoint(gpt, directory, model=config.model)
