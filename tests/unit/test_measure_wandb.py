"""The W&B sink with the real wandb: an offline run read back from its file, and failures that do not stop a run."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb_files import read_exit_codes, read_offline_run

from lora_dist.cli.compose import compose_config
from lora_dist.config import TrackConfig
from lora_dist.measure import wandb_sink
from lora_dist.measure.plots import save_bars
from lora_dist.measure.wandb_sink import RUN_ID_FILE, WandbSink, open_wandb
from lora_dist.run import configure_method
from lora_dist.stopping import Stopped

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"
CONFIG = {"lora": {"rank": 4}, "method": "lora"}
STEP = {"step": 1, "loss": 2.5, "lr": None, "valid_loss": 2.25, "step_time_ms": 10.0, "peak_memory_gib": 0.5}


def collect_history(records: list[Record]) -> dict[str, str]:
    return {
        item.key or "/".join(item.nested_key): item.value_json
        for record in records
        if record.HasField("history")
        for item in record.history.item
    }


def run_once(run_dir: Path, track: TrackConfig, global_rank: int = 0) -> None:
    with open_wandb(track, run_dir, CONFIG, name="lora", global_rank=global_rank) as sink:
        sink.log_step(STEP)
        sink.log_summary({"valid_loss_after": 2.0})


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_RUN_ID",
        "WANDB_PROJECT",
        "WANDB_ENTITY",
        "WANDB_NAME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()  # it reads the environment once


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


def test_offline_run_holds_config_metrics_table_and_plots(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = save_bars(run_dir / "bars.png", title="t", ylabel="y", stacks={"lora": {"weights": 1.0}})
    with open_wandb(TrackConfig(), run_dir, CONFIG, name="lora", global_rank=0) as sink:
        sink.log_step(STEP)
        sink.log_report(["", "lora"], [["steps", "3"]], [plot])
    records = read_offline_run(run_dir)
    history = collect_history(records)
    assert (history["train/loss"], history["valid/valid_loss"]) == ("2.5", "2.25")
    assert (history["perf/step_time_ms"], history["memory/peak_memory_gib"]) == ("10", "0.5")
    assert "train/lr" not in history
    assert {"report/table/_type", "report/bars/_type"} <= set(history)
    config = {item.key: item.value_json for r in records if r.HasField("run") for item in r.run.config.update}
    assert config["lora"] == '{"rank":4}' or config["lora"] == '{"rank": 4}'
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/report/bars*.png"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("wandb: tracking offline (no key")


def test_a_resumed_run_continues_its_id(run_dir: Path) -> None:
    run_once(run_dir, TrackConfig())
    run_id = (run_dir / RUN_ID_FILE).read_text().strip()
    time.sleep(1.1)  # W&B names its directories by the second
    run_once(run_dir, TrackConfig())
    assert (run_dir / RUN_ID_FILE).read_text().strip() == run_id
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{run_id}"))) == 2


def test_a_given_id_wins(run_dir: Path) -> None:
    (run_dir / RUN_ID_FILE).write_text("other")
    run_once(run_dir, TrackConfig(run_id="mine1234"))
    assert (run_dir / RUN_ID_FILE).read_text().strip() == "mine1234"


def test_wandbs_own_variables_say_what_no_override_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose_config([]).track == TrackConfig()
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert compose_config([]).track == TrackConfig(project="ours", entity="team", run_id="mine")
    config = compose_config(["track.run_id=other"])
    assert [configure_method(config, method).track.run_id for method in ("lora", "full")] == [
        "other-lora",
        "other-full",
    ]


def test_variables_that_are_empty_say_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To W&B an empty id alone is an error, which it names."""
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME"):
        monkeypatch.setenv(name, "")
    config = compose_config([])
    run_once(run_dir, config.track)
    assert len((run_dir / RUN_ID_FILE).read_text().strip()) == 8
    assert find_names(run_dir) == {"lora"}


def test_a_name_of_ones_own_stays(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "mine")
    run_once(run_dir, TrackConfig())
    assert find_names(run_dir) == {"mine"}


def find_names(run_dir: Path) -> set[str]:
    return {record.run.display_name for record in read_offline_run(run_dir) if record.HasField("run")}


def test_the_command_for_a_later_upload_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    run_once(run_dir, TrackConfig())
    command = capsys.readouterr().err.split("`")[1]
    found = subprocess.run(
        ["bash", "-c", f"ls -d {command.removeprefix('wandb sync ')}"], capture_output=True, text=True
    )
    assert found.stdout.startswith(str(run_dir))


@pytest.mark.parametrize(
    ("end", "exit_code"), [(None, 0), (ValueError("diverged"), 1), (KeyboardInterrupt(), 1), (Stopped("as asked"), 0)]
)
def test_a_run_that_failed_is_not_finished(end: BaseException | None, exit_code: int, run_dir: Path) -> None:
    with (
        nullcontext() if end is None else pytest.raises(type(end)),
        open_wandb(TrackConfig(), run_dir, CONFIG, name="lora", global_rank=0),
    ):
        if end is not None:
            raise end
    assert read_exit_codes(run_dir) == [exit_code]


@pytest.mark.parametrize(
    ("track", "global_rank"), [(TrackConfig(backend="none"), 0), (TrackConfig(), 1)], ids=["none", "rank1"]
)
def test_nothing_is_written(run_dir: Path, track: TrackConfig, global_rank: int) -> None:
    run_once(run_dir, track, global_rank)
    assert list(run_dir.iterdir()) == []


def test_unreachable_falls_back_to_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    run_once(run_dir, TrackConfig(init_timeout_s=2.0))
    assert time.monotonic() - started < 15
    assert collect_history(read_offline_run(run_dir))["train/loss"] == "2.5"
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot start" in line]
    assert len(said) == 1
    assert said[0].endswith("tracking offline")
    for file in run_dir.rglob("*"):
        assert not file.is_file() or FAKE_KEY.encode() not in file.read_bytes(), file


def test_neither_online_nor_offline_still_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", fail)
    run_once(run_dir, TrackConfig())
    assert (
        capsys.readouterr().err.splitlines()[-1] == "wandb: cannot start offline (disk full); this run is not tracked"
    )


def test_a_wandb_that_does_not_import_stops_no_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where its own dependencies do not fit."""
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr(wandb, "Settings", None)
    run_once(run_dir, TrackConfig())
    assert "cannot be asked for its server" in capsys.readouterr().err


def test_a_later_failure_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("service died")

    sink = WandbSink(SimpleNamespace(log=fail, finish=fail))
    for _ in range(3):
        sink.log_step(STEP)
    sink.close()
    assert capsys.readouterr().err == (
        "wandb: logging a step failed (service died); this run is not tracked from here on\n"
    )


def test_key_is_found_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wandb_sink.has_key()
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_sink.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not wandb_sink.has_key()
    netrc.write_text("machine wandb.example.org login user password secret\n")
    assert wandb_sink.has_key()
    netrc.write_bytes(b"machine wandb.example.org login \xe9 password secret\n")
    assert not wandb_sink.has_key()
