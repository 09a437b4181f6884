"""A task, as `lora-dist evaluate` scores it; standard library only."""

from dataclasses import dataclass, field

from lora_dist.config import FILE_FORMATS
from lora_dist.data_config import FIELD_FORMATS, require_split
from lora_dist.refusals import require, require_one_of

CHOOSES_LABELS = ("accuracy", "accuracy_f1", "matthews")
"""Metrics of tasks whose answer is one of few."""
METRICS = ("e2e", "webnlg", "dart", "sql", "rouge", "accuracy", "accuracy_f1", "matthews", "correlation", "exact")


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """How a task's file reads, and how outputs are scored against it."""

    name: str
    """Shown in tables."""
    format: str
    """Of the references: any of data.format; e2e_text becomes e2e_csv where the file's name ends in .csv."""
    metric: str
    """e2e (BLEU, NIST, METEOR, ROUGE-L, CIDEr), webnlg and dart (BLEU, METEOR, TER), sql, rouge, accuracy, accuracy_f1,
    matthews, correlation, or exact (the output equals a reference)."""
    references: str
    """File of contexts and references."""
    context_fields: list[str] = field(default_factory=lambda: ["context"])
    """As data.context_fields."""
    target_field: str = "target"
    """As data.target_field."""
    split: str | None = None
    """Part of the file, where it holds several (clinc150)."""
    labels: list[str] | None = None
    """All that a model chooses its answer among; null: GLUE's own, for an encoder else those of its training file,
    for a decoder those of all parts of CLINC150's file, or those that occur in the references."""
    positive: str | None = None
    """The label that F1 is of."""
    database: str | None = None
    """WikiSQL's SQLite file (dev.db), for execution accuracy; null leaves that out."""

    def __post_init__(self) -> None:
        require_one_of("task.format", self.format, FILE_FORMATS)
        require_one_of("task.metric", self.metric, METRICS)
        require(
            self.format in FIELD_FORMATS or (self.context_fields, self.target_field) == (["context"], "target"),
            f"task.context_fields={self.context_fields} and task.target_field={self.target_field}:"
            f" task.format={self.format} does not read them, only {' and '.join(FIELD_FORMATS)}; leave them out",
        )
        require_split("task.split", self.split, self.format, example="test")
        self._check_labels()

    def _check_labels(self) -> None:
        labels = self.labels
        require(
            labels is None or self.metric in CHOOSES_LABELS,
            f"task.labels={labels}: task.metric={self.metric} has none, only {', '.join(CHOOSES_LABELS)}; leave it out",
        )
        require(
            labels is None or len(set(labels)) == len(labels) >= 2,
            f"task.labels={labels} must be at least two, each once",
        )
        require(
            labels is None or self.positive is None or self.positive in labels,
            f"task.positive={self.positive} is none of task.labels={labels}; give one of them",
        )
        if (self.metric == "accuracy_f1") != (self.positive is not None):
            raise ValueError(
                f"task.positive={self.positive} is the label that F1 is of:"
                " task.metric=accuracy_f1 needs one, the others have none"
            )
