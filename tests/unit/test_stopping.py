"""Signals are noted, and kill where nothing would be lost by it or where the user insists."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from lora_dist import stopping
from lora_dist.cli.launch import STOPPED, launch_local, tell_stopped
from lora_dist.cli.main import main
from lora_dist.stopping import Stopped, is_stop_requested, note_stop_requests, note_terminations, raise_stopped


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    stopping._first_noted.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_usr1_is_noted_however_often_it_comes_until_the_run_has_stopped() -> None:
    note_stop_requests()
    assert not is_stop_requested()
    for _ in range(3):
        signal.raise_signal(signal.SIGUSR1)
    assert is_stop_requested()
    with pytest.raises(Stopped, match="after step 3"):
        raise_stopped("after step 3")
    assert not is_stop_requested()


@pytest.mark.parametrize("when", ["before it launches", "while it launches"])
def test_a_launcher_that_is_asked_to_stop_starts_nothing(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        assert when == "while it launches"
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: start)
    note_stop_requests()
    if when == "before it launches":
        signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Stopped, match="nothing had begun"):
        launch_local("train", [], 2)


@pytest.mark.parametrize("process", ["alone", "the launcher"])
def test_a_second_interrupt_ends_a_process_that_ends_already(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt if process == "alone" else SignalException("Ctrl-C", signal.SIGINT)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: interrupt)
    monkeypatch.setattr("lora_dist.cli.main._dispatch", lambda _: launch_local("train", [], 2))
    assert main([]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_sigterm_is_noted_around_the_steps_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with note_terminations():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # forwarded twice within a moment: one request
        assert is_stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("first", ["SIGTERM", "SIGUSR1"])
def test_a_second_sigterm_ends_the_process_one_after_usr1_does_not(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SECONDS_OF_ONE_REQUEST", 0.0)
    child = os.fork()
    if child == 0:
        note_stop_requests()
        with note_terminations():
            signal.raise_signal(getattr(signal, first))
            time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGTERM if first == "SIGTERM" else 7)


def test_a_launcher_that_names_a_stop_file_sees_good_exit_codes_and_the_file_of_process_0(tmp_path) -> None:
    assert tell_stopped({"RANK": "0"}) == STOPPED
    named = {"LORA_DIST_STOP_FILE": str(tmp_path / "stopped")}
    assert tell_stopped({**named, "RANK": "1"}) == 0
    assert not (tmp_path / "stopped").exists()
    assert tell_stopped({**named, "RANK": "0"}) == 0
    assert (tmp_path / "stopped").exists()


_LATE_INTERRUPT = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
real = builtins.__import__

def interrupted(name, *args, **options):
    if name == "numpy" and "numpy" not in sys.modules:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **options)

builtins.__import__ = interrupted
from lora_dist.stopping import load_torch

try:
    load_torch()
except KeyboardInterrupt:
    sys.exit("interrupted" if "torch" in sys.modules and "numpy" in sys.modules else "too early")
"""


def test_ctrl_c_while_torch_is_imported_is_not_lost() -> None:
    ended = subprocess.run([sys.executable, "-c", _LATE_INTERRUPT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr.strip().rpartition("\n")[2]) == (1, "interrupted")
