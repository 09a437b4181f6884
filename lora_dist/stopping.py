"""A run asked to stop by a signal ends its step, saves and stops; later it goes on as if it had not.

A scheduler sends SIGUSR1 ahead of a time limit, SIGTERM to end a job. The process that gets one only notes it: all
processes agree in the all-reduce that sums each step's loss (mcore/schedule.py), and so stop after the same step.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SECONDS_OF_ONE_REQUEST = 2.0
"""`timeout`, systemd and a launcher each forward SIGTERM: several within this time are one."""

_OWN_REQUEST = 0
"""No signal has this number."""

_first_noted: dict[int, float] = {}
"""Signal -> monotonic time. Signals belong to the process, and so does this."""


class Stopped(Exception):
    """The run was asked to stop, and has saved what there was; raised on every process once all is written."""


def note_stop_requests() -> None:
    """From here on SIGUSR1 is noted; before, it kills. Called first thing, as a scheduler may send it at any time."""
    signal.signal(signal.SIGUSR1, _note)


def end_on_stop_requests() -> None:
    """From here on SIGUSR1 ends this process, which has nothing to save. Raises Stopped, also for what was noted."""
    signal.signal(signal.SIGUSR1, _stop_at_once)
    if is_stop_requested():
        _stop_at_once()


@contextmanager
def note_terminations() -> Iterator[None]:
    """Around the steps and the last writes: SIGTERM is noted too, a second one ends the process at once.

    Elsewhere the first one does.
    """
    previous = signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_at_next_interrupt() -> None:
    """In a process that ends because of Ctrl-C: another one ends it at once, where Python would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load_torch() -> None:
    """Import it, and raise KeyboardInterrupt afterwards where Ctrl-C came meanwhile.

    torch goes on without numpy where importing that fails, also by KeyboardInterrupt, which is lost then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import torch  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def request_stop() -> None:
    """As if a signal had asked this process."""
    _first_noted.setdefault(_OWN_REQUEST, time.monotonic())


def is_stop_requested() -> bool:
    """Whether this process was asked; what all processes agreed on is `StepResult.stop_requested`."""
    return bool(_first_noted)


def raise_stopped(message: str) -> NoReturn:
    """Called on every process once all that there is is saved; the requests are met and forgotten."""
    _first_noted.clear()
    raise Stopped(message)


def _stop_at_once(*_: object) -> NoReturn:
    print("stopped before anything had begun, as asked; the same command begins it", flush=True)
    raise_stopped("nothing had begun")


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGTERM and now - _first_noted.get(number, now) > _SECONDS_OF_ONE_REQUEST:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _first_noted.setdefault(number, now)
