"""metrics.jsonl over cuts and resumptions, and environment.json."""

import getpass
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from lora_dist.measure.environment import describe_checkout, describe_environment
from lora_dist.measure.metrics_file import MetricsFile, read_metrics


def write_steps(path: Path, steps: range, *, num_steps_done: int) -> None:
    with MetricsFile(path, num_steps_done=num_steps_done) as file:
        for step in steps:
            file.write({"step": step, "loss": 1.0 / (step + 1), "skipped": False})


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, num_steps_done=0)
    file.write({"step": 0, "valid_loss": None})
    file.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert read_metrics(path) == [
        {"step": 0, "valid_loss": None},
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5},
    ]
    file.close()


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(8), num_steps_done=0)
    write_steps(path, range(6, 11), num_steps_done=5)
    assert [line["step"] for line in read_metrics(path)] == list(range(11))


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(4), num_steps_done=0)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]
    write_steps(path, range(4, 6), num_steps_done=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))


def write_step_to_a_full_disk(path: Path) -> None:
    with MetricsFile(path, num_steps_done=0) as file:
        file._file.close()
        file._file = Path("/dev/full").open("a")  # noqa: SIM115
        file.write({"step": 0})


def test_a_line_that_has_no_room_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: .*; free space there"):
        write_step_to_a_full_disk(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("broken", [b"5", b"[]", b'{"a": 1}', b'{"step": "x"}', b"\xff\xfe", b"\0\0", b""])
def test_a_line_that_is_no_steps_is_dropped(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(2), num_steps_done=0)
    with path.open("ab") as file:
        file.write(broken + b"\n")
    write_steps(path, range(2, 4), num_steps_done=1)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]


def test_a_fresh_run_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3), num_steps_done=0)
    write_steps(path, range(0), num_steps_done=0)
    assert read_metrics(path) == []


def test_environment_is_json_and_names_no_host_or_user() -> None:
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["megatron-core"] is not None
    assert environment["cpu"]["num_cores"] >= 1
    assert environment["threads"]["torch"] == torch.get_num_threads()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_checkout_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_checkout(tmp_path) is None
    monkeypatch.setenv("LORA_DIST_COMMIT", "0123456789")
    assert describe_checkout(tmp_path) == {"commit": "0123456789", "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    os.utime(tmp_path / "file", (0, 0))  # git would note that in its index, under a lock
    index = (tmp_path / ".git" / "index").read_bytes()
    clean = describe_checkout(tmp_path)
    assert clean is not None
    assert (tmp_path / ".git" / "index").read_bytes() == index
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "file").write_text("2")
    assert describe_checkout(tmp_path) == {"commit": clean["commit"], "dirty": True}
