"""`score`: outputs against a task's items. The one way in, for files and for what a model has just generated."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_dist.task_config import TaskConfig
from lora_dist.tasks import classification, generation, sql, summaries
from lora_dist.tasks.items import Item
from lora_dist.tasks.paper import ROWS
from lora_dist.tasks.scores import Result, ScoreRow, Scores, format_scores, to_json
from lora_dist.writing import name_when_full

NEEDS_LABELS = ("sql", "accuracy", "accuracy_f1", "matthews", "correlation")
"""Metrics to which an empty output is a row that someone forgot, not a short text."""
Metric = Callable[[TaskConfig, Sequence[str], Sequence[Item]], Result]


def score(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Scores:
    """The scores of one output for each item, in the items' order (`load_items`).

    ValueError where a package of the extra `evaluate` is missing; what else is missing, e.g. Java, is told in a note.
    """
    assert len(predictions) == len(items), "one prediction for each item"
    rows, notes = _METRICS[task.metric](task, predictions, items)
    return Scores(task=task.name, num_items=len(items), rows=rows, notes=notes)


def write_scores(task: TaskConfig, scores: Scores, predictions: str, output: str | None) -> None:
    """In JSON to `output` (null: beside `predictions`, the file they are of), and as a table for the reader."""
    path = Path(output or f"{predictions}.scores.json")
    with name_when_full(path):
        path.write_text(to_json(scores, predictions=predictions, references=task.references), encoding="utf-8")
    print(format_scores(scores, ROWS.get(task.name, [])))
    print(f"\nscores: {path}", flush=True)


def _score_exact(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """Share of outputs that equal a reference, white space at the ends aside."""
    right = sum(output.strip() in item.references for output, item in zip(predictions, items, strict=True))
    return [ScoreRow(label="outputs", values={"exact match": 100 * right / len(items)})], []


_METRICS: dict[str, Metric] = {
    "e2e": generation.score_e2e,
    "webnlg": generation.score_webnlg,
    "dart": generation.score_dart,
    "sql": sql.score_sql,
    "rouge": summaries.score_rouge,
    "accuracy": classification.score_accuracy,
    "accuracy_f1": classification.score_accuracy,
    "matthews": classification.score_matthews,
    "correlation": classification.score_correlation,
    "exact": _score_exact,
}
