"""The command as a user types it: it starts its own processes, and none is left behind.

The processes find a stand-in for lora_dist.run, so that they start in a second.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiers import exhaustive, few_of

STAND_IN = """
import os, pathlib, sys, time, types

def train(config, settle):
    from lora_dist.stopping import is_stop_requested, note_terminations, raise_stopped

    global_rank = int(os.environ["RANK"])
    behaviour = os.environ["BEHAVIOUR"]
    if behaviour in ("heed", "work on"):
        with note_terminations():
            report(global_rank, config)
            while behaviour == "work on" or not is_stop_requested():
                time.sleep(0.01)
        raise_stopped("as asked")
    report(global_rank, config)
    if behaviour == "refuse" or (behaviour == "refuse_one" and global_rank == 1):
        raise ValueError("the value\\nis wrong")
    if behaviour == "bug" and global_rank == 1:
        raise RuntimeError("a bug")
    if behaviour != "finish":
        time.sleep(120)

def report(global_rank, config):
    pathlib.Path(f"{os.environ['STARTED']}/{global_rank}").write_text(f"{os.getpid()} {config.run_dir}")

if os.environ["BEHAVIOUR"] == "start slowly" and "RANK" in os.environ:
    report(int(os.environ["RANK"]), types.SimpleNamespace(run_dir="none"))
    time.sleep(2)

module = types.ModuleType("lora_dist.run")
module.train = module.compare = train
sys.modules["lora_dist.run"] = module
"""


class Command:
    """`lora-dist train` of two processes, started."""

    def __init__(self, directory: Path, behaviour: str) -> None:
        self.started = directory / "started"
        self.started.mkdir()
        (directory / "sitecustomize.py").write_text(STAND_IN)
        root = Path(__file__).parents[2]
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environ = {key: value for key, value in os.environ.items() if key not in ours}
        environ |= {"PYTHONPATH": f"{directory}:{root}", "STARTED": str(self.started), "BEHAVIOUR": behaviour}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_dist.cli.main", "train", "experiment=debug/tiny_lora"],
            cwd=directory,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.read_started()) < 2:
            assert time.monotonic() < deadline, "the processes did not start"
            time.sleep(0.05)

    def read_started(self) -> list[tuple[int, str]]:
        """(pid, run_dir) of each process that reached the work."""
        reports = [file.read_text().split() for file in sorted(self.started.iterdir())]
        return [(int(report[0]), report[1]) for report in reports if len(report) == 2]

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid, _ in self.read_started()):
            assert time.monotonic() < deadline, f"still running: {self.read_started()}"
            time.sleep(0.05)


def test_two_processes_share_one_run_directory_and_finish(tmp_path: Path) -> None:
    command = Command(tmp_path, "finish")
    assert command.wait() == (0, "")
    assert len(command.read_started()) == 2
    assert len({run_dir for _, run_dir in command.read_started()}) == 1


@pytest.mark.parametrize("behaviour", few_of(["refuse", "refuse_one"], "refuse_one"))
def test_a_refusal_is_printed_once_and_ends_every_process(behaviour: str, tmp_path: Path) -> None:
    command = Command(tmp_path, behaviour)
    assert command.wait() == (2, "error: the value is wrong\n")
    command.assert_nothing_left()


def test_a_bug_on_one_process_ends_the_others_and_is_named_last(tmp_path: Path) -> None:
    command = Command(tmp_path, "bug")
    code, errors = command.wait()
    assert code == 1
    assert errors.count("Traceback") == 1
    assert errors.splitlines()[-1] == "error: process 1 failed (exit code 1): RuntimeError: a bug"
    command.assert_nothing_left()


@pytest.mark.parametrize(("stop", "code"), [("SIGINT", 130), *exhaustive(("SIGTERM", 143), ("SIGKILL", -9))])
def test_a_signal_to_the_command_ends_every_process(stop: str, code: int, tmp_path: Path) -> None:
    command = Command(tmp_path, "wait")
    command.wait_until_started()
    command.process.send_signal(getattr(signal, stop))
    assert command.wait() == (code, "" if stop == "SIGKILL" else f"error: stopped by {stop}\n")
    command.assert_nothing_left()


def test_an_interrupt_while_the_processes_start_is_one_line(tmp_path: Path) -> None:
    command = Command(tmp_path, "start slowly")
    command.wait_until_started()
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == (130, "error: stopped by SIGINT\n")
    command.assert_nothing_left()


@pytest.mark.parametrize("stop", few_of(["SIGTERM", "SIGUSR1"], "SIGUSR1"))
def test_a_run_that_saves_when_asked_to_stop_ends_with_a_code_of_its_own(stop: str, tmp_path: Path) -> None:
    command = Command(tmp_path, "heed")
    command.wait_until_started()
    command.process.send_signal(getattr(signal, stop))
    assert command.wait() == (75, "")
    command.assert_nothing_left()


@pytest.mark.exhaustive
def test_a_second_sigterm_ends_every_process_at_once(tmp_path: Path) -> None:
    command = Command(tmp_path, "work on")
    command.wait_until_started()
    command.process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == (143, "error: stopped by SIGTERM\n")
    command.assert_nothing_left()
