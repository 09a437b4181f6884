"""A task's scores: the record in JSON, and the table with the paper's rows beside it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

Values = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """The scores of one way to look at the outputs, e.g. of their raw or their tokenised text."""

    label: str
    values: Values
    """By metric; None where it could not be computed, which a note explains."""


Result = tuple[list[ScoreRow], list[str]]
"""What a metric returns: rows and notes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What `score` returns."""

    task: str
    num_items: int
    rows: list[ScoreRow]
    notes: list[str] = field(default_factory=list)
    """What a reader must know about these numbers."""


def to_json(scores: Scores, *, predictions: str, references: str) -> str:
    """The scores with all digits, and the files they are of."""
    record = {"predictions": predictions, "references": references, **asdict(scores)}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def format_scores(scores: Scores, paper: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """A Markdown table; `paper` holds labelled rows of figures as they are printed there."""
    (head, *metrics), rows = list_columns(scores)
    lines = [
        f"| {head} | {' | '.join(metrics)} |",
        "|:--|" + "--:|" * len(metrics),
        *(f"| {' | '.join(row)} |" for row in rows),
        *(f"| {label} | {' | '.join(shown.get(metric, '') for metric in metrics)} |" for label, shown in paper),
    ]
    return "\n".join([*lines, *(f"Note: {note}." for note in scores.notes)])


def list_columns(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """A table's head, task and metrics, and its rows as they are shown."""
    metrics = list(dict.fromkeys(metric for row in scores.rows for metric in row.values))
    rows = [
        [row.label, *(_show(row.values[metric]) if metric in row.values else "" for metric in metrics)]
        for row in scores.rows
    ]
    return [f"{scores.task}, {scores.num_items:,} items", *metrics], rows


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
