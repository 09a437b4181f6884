"""One run, from configuration to record: the file to read first.

config -> topology -> model (frozen shards) -> method (what trains) -> engine (Megatron's schedule inside ZeRO) -> loop
-> checkpoints and record. Every process of the job runs this file; what only one may do goes through `run_on_first`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from lora_dist.claim import Claim, claim_run_dir
from lora_dist.config import RunConfig
from lora_dist.data.loader import Loader, Loaders, build_loaders
from lora_dist.data.sharing import open_sharing
from lora_dist.engine import Engine
from lora_dist.epochs import settle_epochs
from lora_dist.fusion import compile_chains
from lora_dist.keeper import Keeper, open_keeper
from lora_dist.loop import TrainResult, train_loop
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.graphs import CudaRecorder, MicrobatchGraphs
from lora_dist.mcore.hf_weights import fill_base
from lora_dist.mcore.indexer_weights import open_indexers
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import open_topology
from lora_dist.measure.comparable import check_before_training
from lora_dist.measure.first_step import FirstStep, open_first_step_probe
from lora_dist.measure.ledger import measure_static
from lora_dist.measure.memory import PeakMemoryMeter
from lora_dist.measure.meter import Meter
from lora_dist.measure.observers import Observe, open_observers
from lora_dist.measure.optimizer_state import check_optimizer_state
from lora_dist.measure.report import write_comparison
from lora_dist.measure.summary import Summary, build_summary
from lora_dist.methods import AppliedMethod, apply_method
from lora_dist.out_of_memory import explain_out_of_memory, list_remedies
from lora_dist.run_dir import name_trained, prepare_run_dir, write_config
from lora_dist.stopping import note_terminations, raise_stopped
from lora_dist.topology import DTYPES, Topology, check_cuda_graphs, check_device, choose_device, run_on_first
from lora_dist.validation import Validation
from lora_dist.zero.engine import build_zero_engine

Settle = Callable[[RunConfig], RunConfig]
"""Puts values in the place of what a configuration leaves open (loop.recompute=auto)."""


def keep_as_it_is(config: RunConfig) -> RunConfig:
    """For a configuration that leaves nothing open."""
    return config


def train(config: RunConfig, settle: Settle = keep_as_it_is) -> Summary:
    """Train `config.method` into `config.run_dir`. ValueError for what the user can mend, on every process."""
    with open_job(config) as topology:
        run_on_first(topology, lambda: prepare_run_dir(config))
        return train_method(run_on_first(topology, lambda: settle(config)), topology)


def compare(config: RunConfig, settle: Settle = keep_as_it_is) -> list[Summary]:
    """Train every method of `config.compare` on the same shards and data, one after the other, and write one report."""
    with open_job(config) as topology:
        methods = [configure_method(config, method) for method in config.compare.methods]
        run_on_first(topology, lambda: prepare_run_dir(config))
        run_on_first(topology, lambda: check_before_training(methods, topology))
        summaries = []
        for one in methods:
            run_on_first(topology, partial(prepare_run_dir, one))
            summaries.append(train_method(run_on_first(topology, partial(settle, one)), topology))
        run_on_first(topology, lambda: write_config(config))
        run_on_first(topology, lambda: write_comparison(config, summaries))
        return summaries


def configure_method(config: RunConfig, method: str) -> RunConfig:
    """The run of one method of a comparison, in a directory of its own; a method not yet begun starts fresh."""
    lr = config.compare.lr.get(method, config.optim.lr)
    run_id = config.track.run_id
    return replace(
        config,
        method=method,
        optim=replace(config.optim, lr=lr),
        track=replace(config.track, run_id=f"{run_id}-{method}" if run_id else None),
        run_dir=str(Path(config.run_dir) / method),
        resume="none" if config.resume == "none" else "auto",
    )


@contextmanager
def open_job(config: RunConfig) -> Iterator[Topology]:
    """The processes of this job on their devices; RANK, WORLD_SIZE and LOCAL_RANK say which one this is."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(config.device, local_rank)
    check_device(device, config.dtype)
    if config.cuda_graphs:
        check_cuda_graphs(device)
    with open_topology(config.topology, device=device, local_rank=local_rank, seed=config.loop.seed) as topology:
        yield topology


def train_method(config: RunConfig, topology: Topology) -> Summary:
    """Build, train, save and measure one method in `config.run_dir`, which exists."""
    with explain_out_of_memory(topology.device, list_remedies(config)):
        return _train_method(config, topology)


def _train_method(config: RunConfig, topology: Topology) -> Summary:
    claim = claim_run_dir(config.run_dir, topology)
    memory = PeakMemoryMeter(topology.device)
    with open_sharing(config.run_dir, topology) as share:
        loaders = build_loaders(config, dp_size=topology.dp_size, dp_rank=topology.dp_rank, share=share)
    loop, optim = settle_epochs(
        config.loop, config.optim, rows_per_epoch=loaders.train.num_rows, dp_size=topology.dp_size
    )
    given, config = config, replace(config, loop=loop, optim=optim)
    engine, method = build_engine(config, topology)
    optimizer_state = check_optimizer_state(engine.zero, engine.gpt, engine.trainable, topology)
    keeper = open_keeper(config, topology, engine, method, loaders)
    claim.confirm()  # before anything is written of which the other run may have written its own
    run_on_first(topology, lambda: write_config(given))
    if keeper.num_steps_done >= config.loop.total_steps:
        done = f"{config.run_dir} has {keeper.num_steps_done} steps already, of {config.loop.total_steps} asked for"
        run_on_first(
            topology, lambda: print(f"{done}; raise loop.num_steps or num_epochs to go on", file=sys.stderr, flush=True)
        )
    meter = Meter(topology, num_warmup_steps=config.loop.num_warmup_steps_timing, memory=memory)
    name = f"{config.method}-{config.model.name}"
    observers = open_observers(config, topology, meter, name=name, num_steps_done=keeper.num_steps_done)
    # The observers tell of a failure until all is written, also while the launcher, whom it reaches first, ends us.
    with note_terminations(), observers as observe:
        result, first_step = _run_loop(config, topology, claim, engine, loaders, keeper, meter, observe)
        if result.num_steps_done >= config.loop.total_steps:
            engine.zero.check_outcome(result.valid_loss_after)
            peak_memory = None if first_step is None else memory.read()
            keeper.write_model(name_trained(config), result.num_steps_done, {"valid_loss": result.valid_loss_after})
            return build_summary(
                config,
                topology,
                trainable=engine.trainable,
                optimizer_state=optimizer_state,
                static=measure_static(engine.gpt, engine.trainable, engine.zero),
                first_step=first_step,
                peak_memory=peak_memory,
                throughput=meter.summarize(),
                data=asdict(loaders.report),
                valid_loss_before=result.valid_loss_before,
                valid_loss_after=result.valid_loss_after,
                checkpoint_dir=name_trained(config),
            )
    _stop(config, topology, result.num_steps_done)


def build_engine(config: RunConfig, topology: Topology, *, fill: bool = True) -> tuple[Engine, AppliedMethod]:
    """The model's shard with its weights (unset where `fill` is False), what the method adds, ZeRO around that."""
    dtype = DTYPES[config.dtype]
    assert config.loop.recompute != "auto", "left open"
    compile_chains(config.compile, topology.device)
    gpt = build_model(
        config.model,
        topology,
        dtype=dtype,
        clock=DropoutClock(),
        recompute=config.loop.recompute,
        num_recomputed=config.loop.recompute_layers,
    )
    gpt.label_smoothing = config.optim.label_smoothing
    gpt.attends_in_blocks = config.attends_in_blocks(on_gpu=topology.device.type == "cuda")
    if fill:
        fill_base(gpt, config.model, seed=config.loop.seed)
    open_indexers(gpt, config.data.seq_len, fill=fill)
    method = apply_method(gpt, config)
    zero = build_zero_engine(
        gpt,
        method.trainable,
        zero=config.zero,
        optim=config.optim,
        micro_batch_size=config.loop.micro_batch_size,
        dtype=dtype,
        topology=topology,
    )
    graphs = None
    if config.cuda_graphs:
        graphs = MicrobatchGraphs(gpt, method.trainable, lambda: zero.loss_scale, CudaRecorder())
    return Engine(gpt, zero, method.trainable, topology, seed=config.loop.seed, passes=graphs), method


def _run_loop(
    config: RunConfig,
    topology: Topology,
    claim: Claim,
    engine: Engine,
    loaders: Loaders,
    keeper: Keeper,
    meter: Meter,
    observe: Observe,
) -> tuple[TrainResult, FirstStep | None]:
    measured: list[FirstStep] = []
    result = train_loop(
        engine,
        loaders.train,
        validate=lambda: _validate(engine, loaders.valid),
        loop=config.loop,
        optim=config.optim,
        first_step=keeper.num_steps_done,
        meter=meter,
        open_probe=lambda: open_first_step_probe(engine.gpt, engine.trainable, topology, measured.append),
        observe=observe,
        claim=claim,
        save=keeper.save,
        keep_best=keeper.keep_best,
        valid_loss_before=keeper.valid_loss_before,
    )
    return result, measured[0] if measured else None


def _validate(engine: Engine, valid: Loader | None) -> Validation:
    """The mean loss a target token; nothing without a validation split."""
    return {} if valid is None else {"valid_loss": engine.evaluate(valid.validation_batches())}


def _stop(config: RunConfig, topology: Topology, num_steps_done: int) -> NoReturn:
    """Every process leaves the run, none before the first has written and closed all that is its own."""
    message = (
        f"stopped after step {num_steps_done} of {config.loop.total_steps}, as asked, and saved in {config.run_dir}"
    )
    run_on_first(topology, lambda: print(f"{message}; resume=auto goes on", file=sys.stderr, flush=True))
    raise_stopped(message)
