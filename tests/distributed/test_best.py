"""loop.keep_best: what is written is the best validation's, whatever comes after it and after a restart."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from demo_runs import call
from processes import run_distributed
from safetensors.torch import load_file
from test_baselines import RUN, run_training
from test_encoder_runs import describe_command
from tiers import few_of

from lora_dist.cli.compose import compose_config
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.validation import Best

LONG = ["loop.keep_best=true", "loop.eval_every=1", "loop.save_every=5", "loop.num_steps=7"]
SPLITS = {"lora": "tp2_sp", "bitfit": "pp2", "full": "dp2"}


def describe_run(method: str) -> list[str]:
    """With a learning rate at which the validation loss is lowest before the fifth step."""
    lr = {"full": "3e-3", "lora": "2e0"}.get(method, "3e-1")
    return [*RUN, f"method={method}", f"optim.lr={lr}", "optim.schedule=constant", f"topology={SPLITS[method]}"]


def find_best(run_dir: Path, metric: str, *, highest: bool = False) -> tuple[int, float]:
    """The first step with the best value; what no step has trained does not count."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    values = {line["step"]: line[metric] for line in lines if metric in line and line["step"] > 0}
    best = (max if highest else min)(values, key=values.__getitem__)
    return best, values[best]


def assert_equal(actual: Path, expected: Path) -> None:
    wanted, found = load_file(expected), load_file(actual)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("method", few_of(SPLITS, "lora"))
def test_the_best_is_what_a_run_up_to_it_writes_and_stays(method: str, tmp_path: Path) -> None:
    words, run, short = describe_run(method), tmp_path / "run", tmp_path / "short"
    run_distributed(run_training, 2, [*words, *LONG, f"run_dir={run}"])
    step, loss = find_best(run, "valid_loss")
    assert step < 5
    run_distributed(run_training, 2, [*words, f"loop.num_steps={step}", f"run_dir={short}"])
    file = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert_equal(run / f"best_{file}", short / file)
    if method != "full":
        manifest = json.loads((run / "best_adapter" / "manifest.json").read_text())
        assert (manifest["step"], manifest["metrics"]["valid_loss"]) == (step, loss)

    shutil.rmtree(run / "checkpoints" / "step-000007")
    run_distributed(run_training, 2, [*words, *LONG, f"run_dir={run}", "resume=must"])
    assert_equal(run / f"best_{file}", short / file)


def test_without_it_nothing_more_is_written(tmp_path: Path) -> None:
    run_distributed(run_training, 2, [*describe_run("lora"), "loop.eval_every=1", f"run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "best_adapter").exists()


@pytest.mark.exhaustive
def test_an_encoders_is_the_best_by_its_tasks_score(tmp_path: Path) -> None:
    """The base is random, so the head learns all, within a few steps: of equal scores the first stays."""
    # Scoring takes the rank from the run.
    words = [f"train={tmp_path / 'train.tsv'}", "optim.schedule=constant", "optim.lr=3e-2", "lora.rank=3"]
    long = [*words, "loop.num_steps=20", "loop.save_every=15", "loop.eval_every=1", "loop.keep_best=true"]
    run, short = tmp_path / "run", tmp_path / "short"
    assert run_distributed(call, 2, describe_command(tmp_path, "run", *long, "topology=dp2")) == [0, 0]
    step, accuracy = find_best(run, "valid_accuracy", highest=True)
    assert step < 15
    best = json.loads((run / "summary.json").read_text())["best"]
    assert (best["step"], best["valid_accuracy"]) == (step, accuracy)

    scored = describe_command(tmp_path, "scored", f"adapter={run / 'best_adapter'}")
    assert run_distributed(call, 1, scored) == [0]
    assert json.loads((tmp_path / "scored" / "summary.json").read_text())["scores"]["accuracy"] == accuracy

    ends = describe_command(tmp_path, "short", *words, f"loop.num_steps={step}", "topology=dp2")
    assert run_distributed(call, 2, ends) == [0, 0]
    file = "adapter/adapter_model.safetensors"
    assert_equal(run / f"best_{file}", short / file)
    shutil.rmtree(run / "checkpoints" / "step-000020")
    again = describe_command(tmp_path, "run", *long, "topology=dp2", "resume=must")
    assert run_distributed(call, 2, again) == [0, 0]
    assert_equal(run / f"best_{file}", short / file)


def test_what_is_no_number_is_never_the_best() -> None:
    best = Best(highest=True)
    assert [best.take(value) for value in (None, math.nan, 1.0, math.nan, 1.0, 0.5, None, 2.0)] == [
        *(False, False, True, False, False, False, False, True)
    ]
    assert best.value == 2.0
    assert [Best(highest=False, value=1.0).take(value) for value in (1.0, 0.5)] == [False, True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "loop.keep_best=true chooses between validations, and loop.eval_every=0; give the steps between them"),
        (["loop.eval_every=2", "data=jsonl", "data.train=x.jsonl"], "data.valid is null; give data.valid=FILE"),
    ],
)
def test_what_leaves_no_choice_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compose_config([*RUN, "loop.keep_best=true", *overrides])


def test_an_encoder_is_validated_once_an_epoch(tmp_path: Path) -> None:
    """48 examples, 16 a step; the last step is validated in any case."""
    words = [
        f"train={tmp_path / 'train.tsv'}",
        "loop.num_epochs=2.3",
        "loop.eval_every_epochs=1",
        "loop.keep_best=true",
    ]
    assert run_distributed(call, 1, describe_command(tmp_path, "run", *words)) == [0]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "valid_accuracy" in line] == [0, 3, 6, 7]
    assert (tmp_path / "run" / "best_adapter").is_dir()


def test_an_encoder_has_to_be_validated_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = describe_command(tmp_path, "run", f"train={tmp_path / 'train.tsv'}", "loop.keep_best=true")
    assert run_distributed(call, 1, words) == [2]
    assert "loop.eval_every=0; give the steps between them" in capfd.readouterr().err
