"""A task, as `lora-dist evaluate` scores it; standard library only."""

from dataclasses import dataclass

from lora_dist.config import FILE_FORMATS
from lora_dist.refusals import require_one_of

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
    split: str | None = None
    """Part of the file, where it holds several (clinc150)."""
    positive: str | None = None
    """The label that F1 is of."""
    database: str | None = None
    """WikiSQL's SQLite file (dev.db), for execution accuracy; null leaves that out."""

    def __post_init__(self) -> None:
        require_one_of("task.format", self.format, FILE_FORMATS)
        require_one_of("task.metric", self.metric, METRICS)
        if (self.metric == "accuracy_f1") != (self.positive is not None):
            raise ValueError(
                f"task.positive={self.positive} is the label that F1 is of:"
                " task.metric=accuracy_f1 needs one, the others have none"
            )
