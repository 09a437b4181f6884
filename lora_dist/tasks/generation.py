"""E2E, WebNLG and DART: sentences that say what a meaning representation or a set of triples says."""

import re
from collections.abc import Sequence

from lora_dist.data.triples import SEEN, UNSEEN
from lora_dist.task_config import TaskConfig
from lora_dist.tasks import e2e_text
from lora_dist.tasks.items import Item
from lora_dist.tasks.java import compute_meteor
from lora_dist.tasks.needs import find_java
from lora_dist.tasks.nlg_metrics import NO_JAVA, NO_METEOR, compute_bleu, compute_ter, score_challenge
from lora_dist.tasks.scores import Result, ScoreRow

_MAX_REFERENCES = 6
_NOT_A_LETTER = re.compile(r"(\W)")


def score_e2e(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """On tokenised text, the scale of the paper, and on raw text, where the references are raw.

    Outputs written the other way than the references are converted, and the row's label says so.
    """
    references = [item.references for item in items]
    outputs_tokenized = e2e_text.are_tokenized(predictions)
    references_tokenized = e2e_text.are_tokenized([text for item in references for text in item])
    notes = [_describe_empty(predictions), NO_JAVA if find_java() is None else ""]
    tokenized = [[e2e_text.tokenize(text) for text in item] for item in references]
    label = "tokenised text" if outputs_tokenized else "tokenised text (outputs tokenised here)"
    rows = [_score(label, [e2e_text.tokenize(text) for text in predictions], tokenized)]
    if references_tokenized:
        notes.append("the references are tokenised, so there is no score on raw text; give the published CSV for one")
    else:
        raw = [e2e_text.detokenize(text) for text in predictions] if outputs_tokenized else predictions
        label = "raw text (outputs detokenised here)" if outputs_tokenized else "raw text"
        rows.append(_score(label, raw, references))
    return rows, [note for note in notes if note]


def score_webnlg(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """All items, and BLEU also of those whose category is in the training set and of those whose is not."""
    values: dict[str, float | None] = {}
    for part in (UNSEEN, SEEN):
        kept = [index for index, item in enumerate(items) if item.part == part]
        outputs, references = _write_as_authors([predictions[at] for at in kept], [items[at] for at in kept])
        values[f"BLEU {part}"] = compute_bleu(outputs, references) if kept else None
    rows, notes = score_dart(task, predictions, items)
    missing = [metric for metric, value in values.items() if value is None]
    notes += [f"no item for {', '.join(missing)}: the file has no such category"] if missing else []
    return [ScoreRow(label=row.label, values={**values, **row.values}) for row in rows], notes


def score_dart(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> Result:
    """BLEU, METEOR and TER."""
    outputs, references = _write_as_authors(predictions, items)
    java = find_java()
    meteor = None if java is None else 100 * compute_meteor(java, outputs, references)
    values = {"BLEU": compute_bleu(outputs, references), "METEOR": meteor, "TER": compute_ter(outputs, references)}
    notes = [_describe_empty(predictions), NO_METEOR if java is None else ""]
    label = f"lower-cased, split at punctuation, up to {_MAX_REFERENCES} references"
    return [ScoreRow(label=label, values=values)], [note for note in notes if note]


def _write_as_authors(predictions: Sequence[str], items: Sequence[Item]) -> tuple[list[str], list[list[str]]]:
    """Outputs and references as the LoRA authors' gpt2_decode.py writes them (--tokenize --lower --ref_num 6)."""
    outputs = [_split_at_punctuation(text) for text in predictions]
    return outputs, [[_split_at_punctuation(text) for text in item.references[:_MAX_REFERENCES]] for item in items]


def _split_at_punctuation(text: str) -> str:
    return " ".join(_NOT_A_LETTER.sub(r" \1 ", text.lower()).split())


def _score(label: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> ScoreRow:
    return ScoreRow(label=label, values=score_challenge(outputs, references))


def _describe_empty(predictions: Sequence[str]) -> str:
    number = sum(not text.strip() for text in predictions)
    return f"{number} of {len(predictions)} outputs are empty" if number else ""
