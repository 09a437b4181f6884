"""Whatever a run directory holds: a file for which there is no room is named with the remedy, and no half is left."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_measure_report import ENVIRONMENT, FULL, LORA, build_metrics

from lora_dist.cli.compose import compose_config
from lora_dist.measure.metrics_file import MetricsFile
from lora_dist.measure.observers import open_observers
from lora_dist.measure.plots import save_heat_map
from lora_dist.measure.report import write_report
from lora_dist.plan.report import write_plan, write_search
from lora_dist.run_dir import write_config
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.scores import Scores
from lora_dist.tasks.scoring import write_scores
from lora_dist.writing import write_text

FULL_SIZE = 64
"""Bytes that a file may have while `fill_disk` holds; less than any that is written here."""


@contextmanager
def fill_disk() -> Iterator[None]:
    """The system refuses what is longer, as it refuses what a disk has no room for."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_SIZE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def compose(run_dir: Path, *words: str):
    return compose_config([f"run_dir={run_dir}", "track=none", *words])


def observe(run_dir: Path) -> None:
    with open_observers(compose(run_dir), SimpleNamespace(global_rank=0), None, name="run", num_steps_done=0):  # type: ignore[arg-type]
        pytest.fail("environment.json was written")


def go_on(run_dir: Path) -> None:
    """With the metrics of steps that were done before."""
    MetricsFile(run_dir / "metrics.jsonl", num_steps_done=40)


def compare(run_dir: Path) -> None:
    write_report(run_dir, [LORA, FULL], [build_metrics(2.31), build_metrics(2.28)], ENVIRONMENT)


def write_plan_of_nothing(run_dir: Path) -> None:
    write_plan(compose(run_dir, "hardware=v100_32gb"), [])


def write_search_of_nothing(run_dir: Path) -> None:
    write_search(compose(run_dir, "hardware=v100_32gb"), [])


def score(run_dir: Path) -> None:
    task = TaskConfig(name="toy", format="jsonl", metric="exact", references="answers.jsonl")
    write_scores(task, Scores(task="toy", num_items=1, rows=[], notes=[]), str(run_dir / "said.jsonl"), None)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("config.yaml", lambda run_dir: write_config(compose(run_dir))),
        ("environment.json", observe),
        ("metrics.jsonl", go_on),
        ("summary.json", lambda run_dir: LORA.write(run_dir / "summary.json")),
        ("loss.png", compare),
        ("plan.json", write_plan_of_nothing),
        ("search.json", write_search_of_nothing),
        ("said.jsonl.scores.json", score),
    ],
)
def test_a_file_that_has_no_room_is_named_with_the_remedy(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    if name == "metrics.jsonl":
        (tmp_path / name).write_text('{"step": 1, "loss": 2.5}\n' * FULL_SIZE)
    with fill_disk(), pytest.raises(OSError, match=rf"/{name} cannot be written: .*; raise the limit .* command again"):
        write(tmp_path)


@pytest.mark.parametrize("name", ["report.json", "report.md"])
def test_a_report_that_has_no_room_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_dist.measure.report._draw_plots", lambda *_: [])
    if name == "report.md":
        monkeypatch.setattr("lora_dist.measure.report._to_json", lambda *_: {})
    with fill_disk(), pytest.raises(OSError, match=rf"/{name} cannot be written: .*; raise the limit"):
        compare(tmp_path)


def test_what_has_no_room_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "before")
    with fill_disk(), pytest.raises(OSError, match="cannot be written"):
        write_text(path, "after" * FULL_SIZE)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("config.yaml", "before")]


def test_a_picture_is_a_png_under_its_own_name(tmp_path: Path) -> None:
    path = save_heat_map(tmp_path / "phi.png", title="phi", xlabel="j", ylabel="i", values=[[0.0, 1.0]])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["phi.png"]
