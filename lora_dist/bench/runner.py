"""`lora-dist bench`: contenders in processes of their own, one step each in turn, and the record of it."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from lora_dist.bench.ceilings import Ceilings, CeilingSample
from lora_dist.bench.record import build_record
from lora_dist.bench.worker import Account, Sample, choose_method, serve
from lora_dist.config import OUR_CONTENDERS, RunConfig
from lora_dist.files.hf_checkpoint import is_quantized
from lora_dist.measure.environment import describe_environment
from lora_dist.run_dir import prepare_run_dir
from lora_dist.topology import DTYPES, check_cuda_graphs, choose_device
from lora_dist.writing import format_json, write_text

Context = SpawnContext | ForkContext
RECORD_FILE = "bench.json"
_Answer = TypeVar("_Answer")


@dataclass(kw_only=True, slots=True)
class Measurements:
    """Everything the rounds gave, in their order."""

    samples: dict[str, list[Sample]]
    accounts: dict[str, Account] = field(default_factory=dict)
    ceilings: list[CeilingSample] = field(default_factory=list)
    load_averages: list[float] = field(default_factory=list)
    """Runnable processes on the machine over the last minute, at each timed round."""


def bench(config: RunConfig) -> Path:
    """Run config.bench and write `bench.json` into the run directory; its path."""
    check_bench(config)
    if any(choose_method(config, name).cuda_graphs for name in set(OUR_CONTENDERS) & set(config.bench.contenders)):
        check_cuda_graphs(choose_device(config.device, local_rank=0))
    run_dir = prepare_run_dir(config)
    environment = describe_environment()
    with _open_start_weights(config) as checkpoint:
        started = replace(config, model=replace(config.model, checkpoint=checkpoint))
        measurements = measure_contenders(started)
    record = build_record(config, environment, measurements)
    path = run_dir / RECORD_FILE
    write_text(path, format_json(record))
    print(f"bench: wrote {path}")
    return path


def check_bench(config: RunConfig) -> None:
    """ValueError for a configuration that this bench does not measure."""
    topology = config.topology
    if topology.num_processes != 1:
        raise ValueError(
            f"bench compares with peers on one process, got tp {topology.tp_size} cp {topology.cp_size}"
            f" pp {topology.pp_size} dp {topology.dp_size or 1}; use topology=single"
        )
    loop, ours_alone = config.loop, set(OUR_CONTENDERS) >= set(config.bench.contenders)
    if config.model.base_format != "native" and not ours_alone:
        raise ValueError(
            f"model.base_format={config.model.base_format} is not set up for PEFT here; bench"
            f" {', '.join(OUR_CONTENDERS)} alone"
        )
    if not ours_alone and config.model.checkpoint is not None and is_quantized(config.model.checkpoint):
        raise ValueError(
            f"model.checkpoint={config.model.checkpoint} is quantised, which transformers keeps so, or refuses, by"
            f" machine; bench {', '.join(OUR_CONTENDERS)} alone, or convert the weights to bf16 first"
        )
    if not ours_alone and config.model.wrapper is not None:
        raise ValueError(
            f"model.checkpoint={config.model.checkpoint} is a {config.model.wrapper}, whose text model is trained here"
            f" alone; bench {', '.join(OUR_CONTENDERS)} alone"
        )
    if not (config.lora.has_factors_alone or ours_alone):
        raise ValueError(
            "with its peers bench compares LoRA's factors alone; leave lora.bias, modules_to_save, init and use_dora"
        )
    if loop.recompute == "auto":
        raise ValueError("loop.recompute=auto depends on the contender; bench none, selective or full")
    if (loop.recompute == "selective" or loop.recompute_layers is not None) and not ours_alone:
        raise ValueError(
            f"loop.recompute={loop.recomputation} has no like in transformers; bench none or full in all layers, or"
            f" {', '.join(OUR_CONTENDERS)} alone"
        )


def measure_contenders(config: RunConfig, *, context: Context | None = None) -> Measurements:
    """`num_warmup_rounds` untimed, then `num_rounds` timed, then the account of each contender.

    `context` starts the contenders' processes; spawned unless said otherwise. RuntimeError where one of them fails.
    """
    settings, names = config.bench, config.bench.contenders
    device = choose_device(config.device, local_rank=0)
    if device.type == "cpu":
        torch.set_num_threads(settings.num_threads)
    measurements = Measurements(samples={name: [] for name in names})
    with _open_workers(config, context or multiprocessing.get_context("spawn")) as workers:
        ceilings = Ceilings(config, device, DTYPES[config.dtype])
        num_rounds = settings.num_warmup_rounds + settings.num_rounds
        for round_ in tqdm(range(num_rounds), desc="bench rounds", unit="round"):
            first = round_ % len(names)  # each contender takes each place in turn
            samples = {name: _ask(workers[name], ("step", round_), Sample) for name in [*names[first:], *names[:first]]}
            if round_ >= settings.num_warmup_rounds:
                for name, sample in samples.items():
                    measurements.samples[name].append(sample)
                measurements.ceilings.append(ceilings.measure())
                measurements.load_averages.append(os.getloadavg()[0])
        for name in names:
            measurements.accounts[name] = _ask(workers[name], ("account", num_rounds), Account)
    return measurements


@contextmanager
def _open_workers(config: RunConfig, context: Context) -> Iterator[dict[str, Connection]]:
    """Built one after another, so that building takes no more memory than stepping."""
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for name in config.bench.contenders:
            connection, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, config), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections[name] = connection
            _ask(connection, None, str)  # ready
        yield connections
        for connection in connections.values():
            connection.send(None)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _ask(connection: Connection, order: tuple[str, int] | None, kind: type[_Answer]) -> _Answer:
    """Send an order (None waits for the first answer) and wait. RuntimeError with the contender's own traceback."""
    if order is not None:
        connection.send(order)
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError("a contender's process ended without a word; was it killed for memory?") from None
    if isinstance(answer, str) and answer != "ready":
        raise RuntimeError(f"a contender failed: {answer}")
    assert isinstance(answer, kind)
    return answer


@contextmanager
def _open_start_weights(config: RunConfig) -> Iterator[str | None]:
    """The checkpoint of the configuration, or weights drawn from the seed in a directory that goes away.

    None where all contenders draw them for themselves, being this project's own.
    """
    if config.model.checkpoint is not None or set(OUR_CONTENDERS) >= set(config.bench.contenders):
        yield config.model.checkpoint
        return
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "start")
        process = multiprocessing.get_context("spawn").Process(target=_write_start_weights, args=(config, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"drawing the start weights failed with exit code {process.exitcode}")
        yield path


def _write_start_weights(config: RunConfig, path: str) -> None:
    from lora_dist.bench.ours import write_start_weights

    write_start_weights(config, path)
