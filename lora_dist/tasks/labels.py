"""The labels that a task's answers are chosen among."""

from collections.abc import Sequence

from lora_dist.data.classification import list_intents
from lora_dist.data.glue import TASKS
from lora_dist.data.rows import decode, read_file
from lora_dist.task_config import CHOOSES_LABELS, TaskConfig
from lora_dist.tasks.items import Item


def find_labels(task: TaskConfig, items: Sequence[Item]) -> list[str]:
    """As `list_labels`; empty where the task's answer is free text, or a number.

    ValueError where there is one label alone, which every answer would be, and right.
    """
    if task.metric not in CHOOSES_LABELS:
        return []
    labels = list_labels(task, items)
    if len(labels) < 2:
        raise ValueError(
            f"task.references={task.references}: every row is {labels[0]!r}, so there is nothing to choose among;"
            f" give task.labels=[{labels[0]},...], all that an answer may be"
        )
    return labels


def list_labels(task: TaskConfig, items: Sequence[Item]) -> list[str]:
    """task.labels; else, sorted, GLUE's own, those of all parts of CLINC150's file, or those of the references."""
    if task.labels is not None:
        return task.labels
    if task.format == "clinc150":
        return list_intents(decode(read_file("task.references", task.references)), task.references)
    words = TASKS[task.format.removeprefix("glue_")].words if task.format.startswith("glue_") else {}
    return sorted(set(words.values()) or {item.references[0] for item in items})
