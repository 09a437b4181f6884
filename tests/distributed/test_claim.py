"""Two runs in one directory: the later one has it, the older one ends and leaves what is written alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import run_distributed
from tiers import exhaustive

import lora_dist.run
from lora_dist.claim import claim_run_dir
from lora_dist.cli.compose import compose_config
from lora_dist.config import RunConfig
from lora_dist.engine import Engine, StepResult
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.run_dir import CLAIM_FILE

TAKEN_STEP = 3


def train(config: RunConfig, taken: bool) -> str:
    """How the run ended; where `taken`, another one begins in its directory during a step."""
    whole_step = Engine.train_step

    def train_step(engine: Engine, batches: object, *, step: int, lr: float) -> StepResult:
        if taken and step == TAKEN_STEP - 1:
            claim_run_dir(config.run_dir, engine.topology)
        return whole_step(engine, batches, step=step, lr=lr)

    Engine.train_step = train_step
    try:
        lora_dist.run.train(config)
    except ValueError as problem:
        return str(problem)
    return "done"


@pytest.mark.parametrize(("topology", "world_size"), [("tp2", 2), *exhaustive(("pp2", 2), ("dp2", 2), ("cp2", 2))])
def test_the_older_run_ends_and_the_later_one_goes_on(topology: str, world_size: int, tmp_path: Path) -> None:
    config = compose_config(
        [
            *("experiment=debug/tiny_lora", "loop.num_steps=6", "loop.save_every=2", "loop.keep_checkpoints=9"),
            *(f"topology={topology}", f"run_dir={tmp_path / 'run'}"),
        ]
    )
    expected = replace(config, run_dir=str(tmp_path / "expected"))
    assert run_distributed(train, world_size, expected, False) == ["done"] * world_size

    (problem,) = set(run_distributed(train, world_size, config, True))
    assert "was taken over by a run that began later (host " in problem
    run_dir = tmp_path / "run"
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [entry.name for entry in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "adapter").exists()

    assert run_distributed(train, world_size, replace(config, resume="auto"), False) == ["done"] * world_size
    losses = [
        [line.get("loss") for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("run", "expected")
    ]
    assert losses[0] == losses[1]


def take_over_before_training(config: RunConfig) -> str:
    build = lora_dist.run.build_engine

    def build_engine(config: RunConfig, topology: object) -> object:
        claim_run_dir(config.run_dir, topology)
        return build(config, topology)

    lora_dist.run.build_engine = build_engine
    return train(config, False)


def test_of_two_that_begin_together_one_trains(tmp_path: Path) -> None:
    config = compose_config(["experiment=debug/tiny_lora", "topology=single", f"run_dir={tmp_path / 'run'}"])
    [problem] = run_distributed(take_over_before_training, 1, config)
    assert "was taken over" in problem
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [CLAIM_FILE, "config.yaml"]
    [done] = run_distributed(train, 1, config, False)  # as after any run that was refused
    assert done == "done"


def look(config: RunConfig, text: str | None) -> str:
    with lora_dist.run.open_job(config) as topology:
        Path(config.run_dir).mkdir()
        claim = claim_run_dir(config.run_dir, topology)
        claim.path.unlink() if text is None else claim.path.write_bytes(text.encode(errors="surrogateescape"))
        claim.look()
        try:
            claim.confirm()
        except ValueError as problem:
            return str(problem)
        return "held"


def test_a_claim_that_is_gone_is_nobodys_and_another_text_somebodys(tmp_path: Path) -> None:
    def configure(name: str) -> RunConfig:
        return compose_config(["experiment=debug/tiny_lora", "topology=single", f"run_dir={tmp_path / name}"])

    assert run_distributed(look, 1, configure("gone"), None) == ["held"]
    for name, text in {"broken": "{", "no claim": "[]", "no text": "\udcff"}.items():
        [problem] = run_distributed(look, 1, configure(name), text)
        assert f"({CLAIM_FILE} is not this run's)" in problem
    about = {"host": "n1", "process": 7, "slurm_job": "12", "began": "2026-12-01 10:00:00"}
    [problem] = run_distributed(look, 1, configure("job"), json.dumps(about))
    assert "(host n1, process 7, slurm_job 12, began 2026-12-01 10:00:00)" in problem
