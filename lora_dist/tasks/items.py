"""A task's items: every context once, with all its references, or every row where labels or queries are scored."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows, Fields, Pair, read_file
from lora_dist.data.wikisql import parse_query
from lora_dist.task_config import TaskConfig

_OF_ROWS = ("sql", "accuracy", "accuracy_f1", "matthews", "correlation")
"""Metrics to which a context that occurs twice is two questions, and not one with two references."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What a model is asked once, and what counts as an answer."""

    line: int
    """Of the references' file, where it first stands."""
    context: str
    references: tuple[str, ...]
    part: str = ""
    """As `Pair.part`."""


def load_items(task: TaskConfig) -> list[Item]:
    """In the file's order. ValueError with file and line for a bad row."""
    path = task.references
    content = read_file("task.references", path)
    bad = BadRows(path, "error", remedy="correct the row")
    pairs = read_pairs(content, pick_format(task), bad, split=task.split, fields=name_fields(task))
    items = [_build_item([pair]) for pair in pairs] if task.metric in _OF_ROWS else group_pairs(pairs)
    if not items:
        raise ValueError(f"task.references={path} has no rows; give the file of the references")
    for item in items:
        _check_reference(task, f"{path}:{item.line}", item.references[0])
    return items


def _check_reference(task: TaskConfig, place: str, reference: str) -> None:
    if task.labels is not None and reference not in task.labels:
        raise ValueError(f"{place}: label {reference!r} is none of task.labels={task.labels}; add it")
    if task.metric in _READABLE:
        what, is_readable = _READABLE[task.metric]
        if not is_readable(reference):
            raise ValueError(f"{place}: {reference!r} is no {what}: task.metric={task.metric}")


def name_fields(task: TaskConfig) -> Fields:
    """What the task's rows call context and target."""
    return Fields(context=tuple(task.context_fields), target=task.target_field)


def read_number(text: str) -> float | None:
    """None where it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_READABLE: dict[str, tuple[str, Callable[[str], bool]]] = {
    "sql": ("query", lambda text: parse_query(text) is not None),
    "correlation": ("number", lambda text: read_number(text) is not None),
}
"""Metrics that have to read the references, and as what."""


def pick_format(task: TaskConfig) -> str:
    """The E2E data come as text and as CSV; the name tells."""
    is_csv = Path(task.references).suffix.lower() == ".csv"
    return "e2e_csv" if task.format == "e2e_text" and is_csv else task.format


def group_pairs(pairs: Iterable[Pair]) -> list[Item]:
    """The pairs of one context, wherever they stand, as one item."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.context, pair.part), []).append(pair)
    return [_build_item(group) for group in groups.values()]


def _build_item(pairs: list[Pair]) -> Item:
    first = pairs[0]
    references = tuple(pair.target for pair in pairs)
    return Item(line=first.line, context=first.context, references=references, part=first.part)
