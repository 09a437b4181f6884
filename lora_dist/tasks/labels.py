"""The labels that a task's answers are chosen among."""

from collections.abc import Sequence

from lora_dist.data.glue import TASKS
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item

CHOOSES_LABELS = ("accuracy", "accuracy_f1", "matthews")
"""Metrics of tasks whose answer is one of few."""


def find_labels(task: TaskConfig, items: Sequence[Item]) -> list[str]:
    """GLUE's own, or those that occur in the references, which a whole test set has all; sorted.

    Empty where the task's answer is free text, or a number.
    """
    if task.metric not in CHOOSES_LABELS:
        return []
    words = TASKS[task.format.removeprefix("glue_")].words if task.format.startswith("glue_") else {}
    return sorted(set(words.values()) or {item.references[0] for item in items})
