"""Labels as text: accuracy, F1, Matthews correlation, and Pearson and Spearman correlation of numbers."""

from collections.abc import Sequence

from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item, read_number
from lora_dist.tasks.labels import list_labels
from lora_dist.tasks.needs import import_extra
from lora_dist.tasks.scores import Result, ScoreRow, Values


def score_accuracy(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """Share of right labels, and F1 of the label `task.positive` where that is set; both times 100."""
    given, wanted = _pair_labels(predictions, items)
    right = sum(label == answer for label, answer in zip(given, wanted, strict=True))
    values: dict[str, float | None] = {"accuracy": 100 * right / len(items)}
    if task.positive is not None:
        metrics = import_extra("sklearn.metrics")
        f1 = metrics.f1_score(
            [answer == task.positive for answer in wanted], [label == task.positive for label in given], zero_division=0
        )
        values["F1"] = 100 * float(f1)
    return _report(values, task, given, items)


def score_matthews(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """Matthews correlation, times 100."""
    given, wanted = _pair_labels(predictions, items)
    value = import_extra("sklearn.metrics").matthews_corrcoef(wanted, given)
    return _report({"Matthews": 100 * float(value)}, task, given, items)


def score_correlation(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """Pearson and Spearman correlation, times 100; None where all outputs are one number."""
    numbers = [read_number(text) for text in predictions]
    given = [0.0 if number is None else number for number in numbers]
    wanted = [float(item.references[0]) for item in items]
    stats = import_extra("scipy.stats")
    constant = len(set(given)) < 2 or len(set(wanted)) < 2
    values: Values = {
        "Pearson": None if constant else 100 * float(stats.pearsonr(given, wanted).statistic),
        "Spearman": None if constant else 100 * float(stats.spearmanr(given, wanted).statistic),
    }
    notes = [f"{numbers.count(None)} of {len(items)} outputs are no number and count as 0"] if None in numbers else []
    notes += ["all outputs or all references are one number, so there is no correlation"] if constant else []
    return [ScoreRow(label="outputs", values=values)], notes


def _pair_labels(predictions: Sequence[str], items: Sequence[Item]) -> tuple[list[str], list[str]]:
    return [text.strip() for text in predictions], [item.references[0] for item in items]


def _report(values: Values, task: TaskConfig, given: Sequence[str], items: Sequence[Item]) -> Result:
    """A model may say anything; what is none of the task's labels is a wrong answer, and is counted."""
    known = set(list_labels(task, items))
    unknown = [label for label in given if label not in known]
    notes = [
        f"{len(unknown)} of {len(given)} outputs are none of the labels and count as wrong, e.g. {example!r}"
        for example in unknown[:1]
    ]
    return [ScoreRow(label="outputs", values=values)], notes
