"""A whole run measured with every instrument and gathered into one summary, on several topologies."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_toy import build_run_config
from processes import run_distributed
from tiers import exhaustive
from toy import ALL_TARGETS, MODEL, Case, build_batches, build_case

from lora_dist.base_shapes import count_parameters
from lora_dist.config import LoopConfig, LoraConfig, RunConfig, TopologyConfig
from lora_dist.engine import Engine
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.measure.first_step import FirstStep, open_first_step_probe
from lora_dist.measure.ledger import measure_static
from lora_dist.measure.meter import Meter
from lora_dist.measure.optimizer_state import check_optimizer_state
from lora_dist.measure.summary import SUMMARY_FILE, Summary, build_summary
from lora_dist.zero.engine import build_zero_engine

LORA = LoraConfig(rank=3, target_modules=ALL_TARGETS)
NUM_MICROBATCHES = 2


def build_config(case: Case, run_dir: Path) -> RunConfig:
    return build_run_config(
        MODEL,
        LORA,
        method=case.method,
        topology=TopologyConfig(tp_size=case.tp_size, pp_size=case.pp_size, dp_size=case.dp_size),
        loop=LoopConfig(micro_batch_size=1, global_batch_size=NUM_MICROBATCHES * case.dp_size),
        run_dir=str(run_dir),
    )


def build_engine(case: Case) -> Engine:
    case.dtype, case.lora, config = torch.float32, LORA, build_config(case, Path())
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt, trainable, zero=config.zero, optim=config.optim, micro_batch_size=1, dtype=case.dtype, topology=topology
    )
    return Engine(gpt, zero, trainable, topology, seed=0)


def train_plain(case: Case) -> list[float]:
    engine = build_engine(case)
    return [engine.train_step(build_batches(engine.topology), step=step, lr=1e-3).loss for step in range(3)]


def run(case: Case, run_dir: Path) -> tuple[Summary, list[float]]:
    """The summary, and the losses of a probed and two timed steps."""
    engine = build_engine(case)
    gpt, trainable, topology = engine.gpt, engine.trainable, engine.topology
    meter = Meter(topology, num_warmup_steps=1)
    batches = build_batches(topology)
    first_steps: list[FirstStep] = []
    with open_first_step_probe(gpt, trainable, topology, first_steps.append):
        losses = [engine.train_step(batches, step=0, lr=1e-3).loss]
    for step in (1, 2):
        with meter.step(num_tokens=batches[0].num_tokens, num_loss_tokens=batches[0].num_loss_tokens):
            losses.append(engine.train_step(batches, step=step, lr=1e-3).loss)
            time.sleep(0.05 * topology.global_rank)
    summary = build_summary(
        build_config(case, run_dir),
        topology,
        trainable=trainable,
        optimizer_state=check_optimizer_state(engine.zero, gpt, trainable, topology),
        static=measure_static(gpt, trainable, engine.zero),
        first_step=first_steps[0],
        peak_memory=meter.memory.read(),
        throughput=meter.summarize(),
        data={"num_train_examples": 3},
        valid_loss_before=None,
        valid_loss_after=losses[-1],
        checkpoint_dir=run_dir / "adapter",
    )
    return summary, losses


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    return tmp_path


@pytest.mark.parametrize(
    "case",
    [
        Case(tp_size=2, pp_size=2),
        Case(method="full", dp_size=2),
        *exhaustive(Case(tp_size=2), Case(method="full", tp_size=2, pp_size=2)),
    ],
    ids=str,
)
def test_summary_of_a_run(case: Case, run_dir: Path) -> None:
    results = run_distributed(run, case.world_size, case, run_dir)
    summary = results[0][0]
    assert all(other == summary for other, _ in results)
    assert Summary.read(run_dir / SUMMARY_FILE) == summary
    adapters = sum(spec.num_parameters for spec in build_adapter_specs(LORA, MODEL))
    assert summary.num_trainable_parameters == (adapters if case.method == "lora" else count_parameters(MODEL))
    assert summary.checkpoint_bytes == 1000
    assert 12 * summary.num_trainable_parameters <= summary.optimizer_state_bytes
    assert summary.throughput.step_time_ms.median > 50 * (case.world_size - 1)
    assert summary.cpu_seconds_per_step > 0
    assert sum(summary.ledger_bytes.values()) > 0
    # Without pipelines, LoRA's first layer passes no gradient on, and so reduces none.
    calls = 4.0 if case.method == "full" or case.pp_size > 1 else 4.0 - 1 / MODEL.num_layers
    assert summary.tp_collectives_per_layer == (calls if case.tp_size > 1 else 0.0)


def summarize_again(run_dir: Path) -> Summary:
    """A finished run, resumed: no step runs."""
    case = Case(dp_size=1)
    engine = build_engine(case)
    gpt, trainable, topology = engine.gpt, engine.trainable, engine.topology
    meter = Meter(topology, num_warmup_steps=1)
    return build_summary(
        build_config(case, run_dir),
        topology,
        trainable=trainable,
        optimizer_state=check_optimizer_state(engine.zero, gpt, trainable, topology),
        static=measure_static(gpt, trainable, engine.zero),
        first_step=None,
        peak_memory=None,
        throughput=meter.summarize(),
        data={},
        valid_loss_before=None,
        valid_loss_after=None,
        checkpoint_dir=run_dir / "adapter",
    )


def test_a_finished_run_keeps_its_summary(run_dir: Path) -> None:
    [unmeasured] = run_distributed(summarize_again, 1, run_dir)
    assert (unmeasured.throughput, unmeasured.step_ledger, unmeasured.peak_memory) == (None, None, None)
    assert (unmeasured.flops_per_step, unmeasured.collectives) == (None, None)
    assert unmeasured.tp_collectives_per_layer is None
    [(summary, _)] = run_distributed(run, 1, Case(), run_dir)
    assert run_distributed(summarize_again, 1, run_dir) == [summary]
    shorter = replace(summary, num_steps=summary.num_steps - 1)  # as where the run went on and died before its end
    shorter.write(run_dir / SUMMARY_FILE)
    [renewed] = run_distributed(summarize_again, 1, run_dir)
    assert (renewed.num_steps, renewed.throughput) == (summary.num_steps, None)


def test_flops_of_a_run_do_not_depend_on_the_replicas(run_dir: Path) -> None:
    one, two = (run_distributed(run, size, Case(dp_size=size), run_dir)[0][0] for size in (1, 2))
    assert one.flops_per_step == two.flops_per_step


def test_instruments_change_nothing(run_dir: Path) -> None:
    case = Case(tp_size=2)
    assert [losses for _, losses in run_distributed(run, 2, case, run_dir)] == run_distributed(train_plain, 2, case)
