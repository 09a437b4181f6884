"""SAMSum and DialogSum: ROUGE-1, ROUGE-2 and ROUGE-L of summaries."""

from collections.abc import Callable, Sequence
from statistics import fmean

from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item
from lora_dist.tasks.needs import import_extra
from lora_dist.tasks.scores import Result, ScoreRow

Pick = Callable[[list[float]], float]
_KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}


def score_rouge(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """F1 of stemmed words by the package rouge-score, times 100; the mean over outputs.

    Where there are several references there are two rows, as both are in use: their mean, and the best of them.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(list(_KINDS.values()), use_stemmer=True)
    scored = [
        [scorer.score(reference, output) for reference in item.references]
        for output, item in zip(predictions, items, strict=True)
    ]

    def average(pick: Pick) -> dict[str, float | None]:
        of_items = {
            metric: [pick([one[kind].fmeasure for one in item]) for item in scored] for metric, kind in _KINDS.items()
        }
        return {metric: 100 * sum(values) / len(values) for metric, values in of_items.items()}

    several = max(len(item.references) for item in items) > 1
    label = "F1 of stemmed words"
    if not several:
        return [ScoreRow(label=label, values=average(max))], []
    return [
        ScoreRow(label=f"{label}, mean over references", values=average(fmean)),
        ScoreRow(label=f"{label}, best reference", values=average(max)),
    ], []
