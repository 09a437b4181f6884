"""A whole run measured with every instrument and gathered into one summary, on several topologies."""

import time

import pytest
import torch
from processes import run_distributed
from toy import ALL_TARGETS, MODEL, SEQ_LEN, Case, build_batches, build_case

from lora_dist.config import (
    CompareConfig,
    DataConfig,
    LoopConfig,
    LoraConfig,
    OptimConfig,
    RunConfig,
    TopologyConfig,
    TrackConfig,
    ZeroConfig,
)
from lora_dist.engine import Engine
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.measure.ledger import measure_static
from lora_dist.measure.meter import Meter
from lora_dist.measure.optimizer_state import check_optimizer_state
from lora_dist.measure.probe import open_probe
from lora_dist.measure.summary import Summary, build_summary
from lora_dist.zero.engine import build_zero_engine

LORA = LoraConfig(rank=3, target_modules=ALL_TARGETS)
NUM_MICROBATCHES = 2


def build_config(case: Case) -> RunConfig:
    return RunConfig(
        model=MODEL,
        method=case.method,
        lora=LORA,
        topology=TopologyConfig(tp_size=case.tp_size, pp_size=case.pp_size, dp_size=case.dp_size),
        zero=ZeroConfig(stage=1),
        data=DataConfig(name="fake", format="fake", seq_len=SEQ_LEN),
        optim=OptimConfig(),
        loop=LoopConfig(micro_batch_size=1, global_batch_size=NUM_MICROBATCHES * case.dp_size),
        track=TrackConfig(backend="none"),
        compare=CompareConfig(),
        run_dir="unused",
    )


def build_engine(case: Case) -> Engine:
    case.dtype, case.lora, config = torch.float32, LORA, build_config(case)
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt, trainable, zero=config.zero, optim=config.optim, micro_batch_size=1, dtype=case.dtype, topology=topology
    )
    return Engine(gpt, zero, trainable, topology, seed=0)


def train_plain(case: Case) -> list[float]:
    engine = build_engine(case)
    return [engine.train_step(build_batches(engine.topology), step=step, lr=1e-3).loss for step in range(3)]


def run(case: Case) -> tuple[Summary, list[float]]:
    """The summary, and the losses of a probed and two timed steps."""
    engine = build_engine(case)
    gpt, trainable, topology = engine.gpt, engine.trainable, engine.topology
    meter = Meter(topology, num_warmup_steps=1)
    batches = build_batches(topology)
    with open_probe(gpt, list(gpt.decoder.layers), trainable, topology, num_microbatches=len(batches)) as probe:
        losses = [engine.train_step(batches, step=0, lr=1e-3).loss]
    for step in (1, 2):
        with meter.step(num_tokens=batches[0].num_tokens, num_loss_tokens=batches[0].num_loss_tokens):
            losses.append(engine.train_step(batches, step=step, lr=1e-3).loss)
            time.sleep(0.05 * topology.global_rank)
    summary = build_summary(
        build_config(case),
        topology,
        trainable,
        optimizer_state=check_optimizer_state(engine.zero, gpt, trainable, topology),
        static=measure_static(gpt, trainable, engine.zero),
        probe=probe,
        peak=meter.memory.read(),
        throughput=meter.summarize(),
        checkpoint_bytes=1000 + topology.global_rank,
        valid_loss_before=None,
        valid_loss_after=losses[-1],
        num_steps=3,
        data={},
    )
    return summary, losses


@pytest.mark.parametrize(
    "options", [{}, {"tp_size": 2}, {"dp_size": 2}, {"tp_size": 2, "pp_size": 2}], ids=lambda o: str(Case(**o))
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_summary_of_a_run(method: str, options: dict[str, int]) -> None:
    case = Case(method=method, **options)
    results = run_distributed(run, case.world_size, case)
    summary = results[0][0]
    assert all(other == summary for other, _ in results)
    adapters = sum(spec.num_parameters for spec in build_adapter_specs(LORA, MODEL))
    assert summary.num_trainable_parameters == (adapters if method == "lora" else MODEL.num_parameters)
    assert summary.checkpoint_bytes == 1000
    assert 12 * summary.num_trainable_parameters <= summary.optimizer_state_bytes
    assert summary.throughput.step_time_ms.median > 50 * (case.world_size - 1)
    assert summary.cpu_seconds_per_step > 0
    # A pipeline's first stage passes no gradient out of its first layer's projection in LoRA at pp 1.
    calls = (4 * MODEL.num_layers - (method == "lora")) / MODEL.num_layers
    expected = {1: 0.0, 2: calls if case.pp_size == 1 else 4.0}[case.tp_size]
    assert summary.tp_collectives_per_layer == expected
    assert sum(summary.ledger_bytes.values()) > 0


def test_flops_of_a_run_do_not_depend_on_the_replicas() -> None:
    one, two = (run_distributed(run, size, Case(dp_size=size))[0][0] for size in (1, 2))
    assert one.flops_per_step == two.flops_per_step


def test_instruments_change_nothing() -> None:
    case = Case(tp_size=2)
    assert [losses for _, losses in run_distributed(run, 2, case)] == run_distributed(train_plain, 2, case)
