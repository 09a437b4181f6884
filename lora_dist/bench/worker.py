"""One contender in a process of its own, stepping when told: its CPU time and peak memory are its own."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from lora_dist.batch import Batch
from lora_dist.bench.batches import build_batches
from lora_dist.bench.contender import Contender
from lora_dist.config import OUR_CONTENDERS, RunConfig
from lora_dist.measure.flops import count_flops
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.measure.memory import PeakMemory, PeakMemoryMeter
from lora_dist.topology import DTYPES, choose_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed step."""

    seconds: float
    """Wall time; on a GPU the time between two CUDA events around the step."""
    cpu_seconds: float
    """CPU time of the contender's process, all threads."""
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What one step takes besides time, measured in steps that are not timed."""

    num_trainable: int
    num_parameters: int
    saved_activation_bytes: int
    """Peak of the unique storages autograd keeps for backward, parameters left out."""
    flops: int
    """Of one step, by torch's FlopCounterMode: what really ran, recomputation included."""
    peak_memory: PeakMemory
    """Since the contender was built, over all its steps."""


def build_contender(name: str, config: RunConfig, device: torch.device) -> Contender:
    """Imports late: no contender's process holds another's libraries."""
    dtype = DTYPES[config.dtype]
    if name in OUR_CONTENDERS:
        from lora_dist.bench.ours import OurContender

        return OurContender(choose_method(config, name), device)
    from lora_dist.bench.peers import PeerContender

    return PeerContender(config, device, dtype, lora=name != "hf_full", tuned=name != "peft")


def choose_method(config: RunConfig, name: str) -> RunConfig:
    """The run of one of OUR_CONTENDERS. ValueError where it could not be one."""
    method, _, variant = name.partition("_")
    if variant == "recompute":
        config = replace(config, loop=replace(config.loop, recompute="full", recompute_layers=None))
    return replace(
        config,
        method=method,
        compile=config.compile or variant == "compiled",
        cuda_graphs=config.cuda_graphs or variant == "graphs",
    )


def serve(connection: Connection, name: str, config: RunConfig) -> None:
    """Answer `step N` with a Sample and `account N` with an Account until told to end; an error answers as its text."""
    try:
        device = choose_device(config.device, local_rank=0)
        if device.type == "cpu":
            torch.set_num_threads(config.bench.num_threads)
        memory = PeakMemoryMeter(device)
        contender = build_contender(name, config, device)
        connection.send("ready")
        while (order := connection.recv()) is not None:
            kind, step = order
            batches = build_batches(config, step)
            if kind == "step":
                connection.send(time_step(contender, batches, step, device))
            else:
                connection.send(take_account(contender, batches, step, memory))
    except EOFError:
        return  # the parent is gone
    except Exception:  # whatever it was, the parent waits for an answer and raises it
        connection.send(f"{name}: {traceback.format_exc()}")


def time_step(contender: Contender, batches: Sequence[Batch], step: int, device: torch.device) -> Sample:
    read_seconds = _start_timer(device)
    cpu_started = time.process_time()
    loss = contender.step(batches, step)
    cpu_seconds = time.process_time() - cpu_started
    return Sample(seconds=read_seconds(), cpu_seconds=cpu_seconds, loss=loss)


def _start_timer(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        started = time.perf_counter()
        return lambda: time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()

    def read() -> float:
        end.record()
        torch.cuda.synchronize(device)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    return read


def take_account(contender: Contender, batches: Sequence[Batch], step: int, memory: PeakMemoryMeter) -> Account:
    peak_memory = memory.read()
    contender.run_as_written()
    with open_activation_ledger(contender.parameters) as activations:
        contender.step(batches, step)
    with count_flops() as counter:
        contender.step(batches, step + 1)
    parameters = list(contender.parameters())
    return Account(
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        num_parameters=sum(p.numel() for p in parameters),
        saved_activation_bytes=activations.peak_bytes,
        flops=int(counter.get_total_flops()),
        peak_memory=peak_memory,
    )
