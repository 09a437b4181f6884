"""Started bare, a verb starts its own processes on this machine, through torchrun's launcher."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dist.stopping import Stopped, end_at_next_interrupt, end_on_stop_requests, load_torch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved; the shell's EX_TEMPFAIL: again later."""
_LAUNCHER_PID = "LORA_DIST_LAUNCHER_PID"
_STOP_FILE = "LORA_DIST_STOP_FILE"


def launch_local(verb: str, overrides: Sequence[str], num_processes: int) -> int:
    """Run the verb on `num_processes` local processes; the exit code for the shell.

    When one process fails the others are ended, and one line says what the first failure was. SIGINT, SIGTERM,
    SIGHUP, SIGQUIT and SIGUSR1 reach every process, which then has 30 seconds, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
    Stopped, with nothing begun, for a SIGUSR1 before there are processes.
    """
    load_torch()
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    end_on_stop_requests()  # until the launcher's own handler passes requests on
    _silence_elastic_log()
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    with (
        tempfile.TemporaryDirectory() as directory,
        _name_stop_file(Path(directory) / "stopped") as stop_file,
        _hold_interrupts(),
    ):
        launcher = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=directory),
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        )
        try:
            elastic_launch(launcher, sys.executable)("-m", "lora_dist.cli.main", verb, *overrides)
        except ChildFailedError as error:
            return _report_failures(list(error.failures.values()))
        except SignalException as stop:
            end_at_next_interrupt()
            if not stop_file.exists():
                print(f"error: stopped by {stop.sigval.name}", file=sys.stderr)
                return 128 + stop.sigval.value
        if stop_file.exists():
            raise Stopped("said by process 0")
    return 0


@contextmanager
def _name_stop_file(stop_file: Path) -> Iterator[Path]:
    """For the processes started here; this one's own launcher may have named it another."""
    outer = os.environ.get(_STOP_FILE)
    os.environ[_STOP_FILE] = str(stop_file)
    try:
        yield stop_file
    finally:
        del os.environ[_STOP_FILE]
        if outer is not None:
            os.environ[_STOP_FILE] = outer


@contextmanager
def _hold_interrupts() -> Iterator[None]:
    """SIGINT waits in processes started meanwhile until `end_with_launcher`: Python, starting, would print a traceback.

    Here another thread takes it, and this one runs the handler all the same.
    """
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        over.set()


def end_with_launcher() -> None:
    """In a process of `launch_local`: be ended by its SIGINT, and when it is killed, which could not tell us.

    KeyboardInterrupt where SIGINT has come while this process started.
    """
    launcher_pid = os.environ.get(_LAUNCHER_PID)
    if launcher_pid is None:
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher_pid):
        sys.exit("error: the launcher is gone")


def tell_stopped(environ: Mapping[str, str]) -> int:
    """The exit code of a process whose run has stopped by request.

    A launcher that ends a job at its first bad exit code (`srun --kill-on-bad-exit`) names a file instead: process 0
    makes it, and all end well.
    """
    stop_file = environ.get(_STOP_FILE)
    if stop_file is None:
        return STOPPED
    if environ.get("RANK", "0") == "0":
        Path(stop_file).touch()
    return 0


def record_failure(error: Exception) -> bool:
    """Leave `error` where a torchrun-style launcher looks for it; True where `launch_local` will print it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        details = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": describe_error(error), "extraInfo": details}}))
    return file is not None and _LAUNCHER_PID in os.environ


def describe_error(error: Exception) -> str:
    """One line; the kind of error only where it was not the user's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _report_failures(failures: "list[ProcessFailure]") -> int:
    """One line for the failure that caused the others."""
    first = min(failures, key=_order_as_cause)
    if first.exitcode == USER_ERROR:
        print(f"error: {_read_message(first)}", file=sys.stderr)
        return USER_ERROR
    name = signal.Signals(-first.exitcode).name if first.exitcode < 0 else f"exit code {first.exitcode}"
    print(f"error: process {first.local_rank} failed ({name}): {_read_message(first)}", file=sys.stderr)
    return 1


def _order_as_cause(failure: "ProcessFailure") -> tuple[int, int]:
    """A refusal, then a crash that left no time to write, then the earliest error; SIGTERM is the launcher's own."""
    file = Path(failure.error_file)
    if failure.exitcode == USER_ERROR:
        return 0, 0
    if failure.exitcode < 0:
        return (3 if -failure.exitcode == signal.SIGTERM else 1), 0
    return 2, file.stat().st_mtime_ns if file.is_file() else 0


def _read_message(failure: "ProcessFailure") -> str:
    file = Path(failure.error_file)
    if not file.is_file():
        return "it left no message"
    return str(json.loads(file.read_text())["message"]["message"])


def _silence_elastic_log() -> None:
    """Its warnings on a failing process say less than our one line."""
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False
