"""metrics.jsonl: one JSON line a step, each step once, also after a run was cut off and resumed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_dist.writing import name_when_full, write_text

METRICS_FILE = "metrics.jsonl"

Metrics = Mapping[str, float | int | bool | None]


class MetricsFile:
    """Appends lines, each on disk for other readers before the next step starts. For one process of a run."""

    def __init__(self, path: Path, *, num_steps_done: int) -> None:
        """Lines of steps after `num_steps_done` are cut: those steps run again. 0 with a fresh run: an empty file."""
        kept = _read_kept_lines(path, num_steps_done)
        write_text(path, "".join(line + "\n" for line in kept))
        with name_when_full(path):
            self._file = path.open("a", encoding="utf-8")
        self._path = path

    def write(self, metrics: Metrics) -> None:
        """One line. What is not a finite number becomes null: NaN is not JSON."""
        line = json.dumps({name: _to_json(value) for name, value in metrics.items()})
        with name_when_full(self._path):
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        with name_when_full(self._path):  # closing tries again to write what could not be written
            self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; one that a killed process or a full disk left broken is passed over."""
    return [metrics for line in _split_lines(path) if (metrics := _parse(line)) is not None]


def _read_kept_lines(path: Path, num_steps_done: int) -> list[str]:
    if num_steps_done == 0:
        return []
    lines = [(line, _parse(line)) for line in _split_lines(path)]
    return [line for line, metrics in lines if metrics is not None and metrics["step"] <= num_steps_done]


def _split_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _parse(line: str) -> dict[str, Any] | None:
    """None where it is no step's line."""
    try:
        metrics = json.loads(line)
    except json.JSONDecodeError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None


def _to_json(value: float | int | bool | None) -> float | int | bool | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
