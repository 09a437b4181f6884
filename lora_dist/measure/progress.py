"""What a person watching a run sees: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Steps of one method. For one process of a run."""

    def __init__(self, name: str, *, num_steps: int, num_steps_done: int) -> None:
        self._name, self._num_steps = name, num_steps
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, initial=num_steps_done, desc=name, unit="step", disable=not self._on_terminal, leave=True
        )
        self._last_line = 0.0

    def show(self, metrics: Mapping[str, float | int | bool | None]) -> None:
        """One step's metrics by their names in metrics.jsonl."""
        shown = {
            name: f"{value:.4g}"
            for name, value in metrics.items()
            if (name == "loss" or name.startswith("valid_")) and value is not None
        }
        done = int(metrics["step"] or 0)
        if self._on_terminal:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        is_due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES
        if is_due or "valid_loss" in shown or done == self._num_steps:
            self._last_line = time.monotonic()
            numbers = "".join(f"  {name} {value}" for name, value in shown.items())
            print(f"{self._name}: step {done}/{self._num_steps}{numbers}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
