"""One process of a run is signalled: all stop after the same step, saved, and the run goes on as if undisturbed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from processes import run_distributed
from tiers import exhaustive

import lora_dist.run
from lora_dist.checkpoint.resume import find_newest_checkpoint
from lora_dist.cli.compose import compose_config
from lora_dist.config import RunConfig
from lora_dist.engine import Engine, StepResult
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.stopping import Stopped, note_stop_requests

NUM_STEPS, SIGNALLED_STEP = 6, 2
MEASURED = {"step_time_ms", "tokens_per_sec_per_gpu", "peak_memory_gib"}


def configure(run_dir: Path, *overrides: str) -> RunConfig:
    return compose_config(
        [
            *("experiment=debug/tiny_lora", f"loop.num_steps={NUM_STEPS}", "loop.eval_every=2", "lora.dropout=0.1"),
            *(f"run_dir={run_dir}", *overrides),
        ]
    )


def train(config: RunConfig, number: int | None = None, verb: str = "train") -> str | None:
    """What the run said when it stopped early; `number` is sent to the last process, alone, in one of its steps."""
    note_stop_requests()
    whole_step = Engine.train_step

    def train_step(engine: Engine, batches: object, *, step: int, lr: float) -> StepResult:
        topology = engine.topology
        if number is not None and step == SIGNALLED_STEP and topology.global_rank == topology.world_size - 1:
            os.kill(os.getpid(), number)
        return whole_step(engine, batches, step=step, lr=lr)

    Engine.train_step = train_step
    try:
        getattr(lora_dist.run, verb)(config)
    except Stopped as stop:
        return str(stop)
    return None


def read_training(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("topology", "world_size", "number"),
    [*exhaustive(("tp2", 2, signal.SIGUSR1)), ("tp2_pp2", 4, signal.SIGTERM), *exhaustive(("dp2", 2, signal.SIGTERM))],
)
def test_one_process_is_signalled_and_all_stop_after_that_step(
    topology: str, world_size: int, number: int, tmp_path: Path
) -> None:
    expected, config = tmp_path / "expected", configure(tmp_path / "run", f"topology={topology}")
    assert run_distributed(train, world_size, replace(config, run_dir=str(expected))) == [None] * world_size

    (message,) = set(run_distributed(train, world_size, config, number))
    assert message.startswith(f"stopped after step {SIGNALLED_STEP + 1} of {NUM_STEPS}, as asked, and saved in ")
    newest = find_newest_checkpoint(config.run_dir)
    assert newest is not None
    assert newest.name == f"step-{SIGNALLED_STEP + 1:06d}"
    assert len(read_training(tmp_path / "run")) == SIGNALLED_STEP + 2  # step 0 is the validation before the first
    assert not (tmp_path / "run" / "adapter").exists()

    resumed = replace(config, resume="auto")
    assert run_distributed(train, world_size, resumed) == [None] * world_size
    assert read_training(tmp_path / "run") == read_training(expected)
    adapters = [run_dir / "adapter" / "adapter_model.safetensors" for run_dir in (tmp_path / "run", expected)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.exhaustive
def test_a_comparison_stops_in_the_method_it_is_at_and_goes_on_there(tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    (message,) = set(run_distributed(train, 2, config, signal.SIGUSR1, "compare"))
    assert message.endswith(str(tmp_path / "run" / "lora"))
    assert not (tmp_path / "run" / "full").exists()
    assert run_distributed(train, 2, replace(config, resume="auto"), None, "compare") == [None, None]
    assert [len(read_training(tmp_path / "run" / method)) for method in ("lora", "full")] == [NUM_STEPS + 1] * 2
    assert (tmp_path / "run" / "report.md").exists()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    config = configure(tmp_path / "run", f"loop.num_steps={SIGNALLED_STEP + 1}")
    assert run_distributed(train, 2, config, signal.SIGUSR1) == [None, None]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
