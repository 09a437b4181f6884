"""A classification file as an encoder reads it: one or two sentences tokenised as a pair, and the label's number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dist.classify_config import EncoderConfig
from lora_dist.data.contexts import read_contexts
from lora_dist.data.glue import SENTENCE_END, TASKS, read_sentences
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows, Pair, decode, read_file
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import name_fields, read_number

_GLUE = "glue_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What the head's outputs mean: a word each, or one number."""

    words: tuple[str, ...]
    """Empty where the label is a number (task.metric=correlation)."""

    @property
    def num_outputs(self) -> int:
        return len(self.words) or 1

    def encode(self, target: str) -> float:
        return self.words.index(target) if self.words else float(target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One input as the tokenizer made it, without padding."""

    inputs: dict[str, list[int]]
    label: float
    is_cut: bool
    """Whether it is longer than encoder.seq_len."""

    @property
    def num_tokens(self) -> int:
        return len(self.inputs["input_ids"])


def load_pairs(key: str, task: TaskConfig, split: str | None, bad: BadRows) -> list[Pair]:
    """Every good row of the file `bad.path`; GLUE's with its sentences apart. ValueError where there is none."""
    content = read_file(key, bad.path)
    if task.format.startswith(_GLUE):
        pairs = list(read_sentences(task.format.removeprefix(_GLUE), decode(content), bad))
    else:
        pairs = list(read_pairs(content, task.format, bad, split=split, fields=name_fields(task)))
    if not pairs:
        found = bad.describe() or "it is empty"
        raise ValueError(f"{key}={bad.path}: no row is usable as {task.format} ({found}); give a file that has some")
    return pairs


def load_unlabelled(key: str, path: str, task: TaskConfig) -> tuple[list[str], list[Pair]]:
    """Every row of the file without its label, which it need not have: as tasks write contexts, and as `load_pairs`.

    ValueError `file:line: ...` at the first bad row, and where there is none.
    """
    content = read_file(key, path)
    contexts = [
        one.text for one in read_contexts(content, task.format, path, split=task.split, fields=name_fields(task))
    ]
    if not task.format.startswith(_GLUE):
        return contexts, [Pair(row, context, "") for row, context in enumerate(contexts, 1)]
    bad = BadRows(path, "error", remedy="correct the row")
    return contexts, list(read_sentences(task.format.removeprefix(_GLUE), decode(content), bad, labelled=False))


def has_two_sentences(task: TaskConfig) -> bool:
    """Whether an input is a pair, whatever its rows hold."""
    return task.format.startswith(_GLUE) and len(TASKS[task.format.removeprefix(_GLUE)].columns) == 2


def find_label_words(task: TaskConfig, pairs: Sequence[Pair]) -> Labels:
    """task.labels, or GLUE's own in GLUE's order; elsewhere those of the training file, sorted. None for numbers.

    ValueError where there is one alone, which every answer would be.
    """
    if task.metric == "correlation":
        return Labels(words=())
    if task.labels is not None:
        return Labels(words=tuple(task.labels))
    if task.format.startswith(_GLUE):
        return Labels(words=tuple(TASKS[task.format.removeprefix(_GLUE)].words.values()))
    words = sorted({pair.target for pair in pairs})
    if len(words) == 1:
        raise ValueError(
            f"all {len(pairs)} rows are {words[0]!r}, so there is nothing to choose among; give"
            f" task.labels=[{words[0]},...], all that an answer may be"
        )
    return Labels(words=tuple(words))


def encode_examples(
    key: str,
    path: str,
    pairs: Sequence[Pair],
    task: TaskConfig,
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    labelled: bool = True,
) -> list[Example]:
    """Of `load_pairs`' rows. ValueError with file and line for a label that is none of `labels`, or no number, unless
    the rows have none.
    """
    if labelled:
        for pair in pairs:
            _check_label(f"{key}={path}:{pair.line}", pair.target, labels)
    sentences = [pair.context for pair in pairs]
    seconds = None
    if has_two_sentences(task):
        sentences, seconds = map(list, zip(*(text.split(SENTENCE_END) for text in sentences), strict=True))
    encoded = tokenizer(sentences, seconds, truncation=True, max_length=seq_len)
    full = [row for row, tokens in enumerate(encoded["input_ids"]) if len(tokens) == seq_len]
    cut = _find_longer(full, sentences, seconds, tokenizer, seq_len)
    return [
        Example(
            inputs={name: rows[row] for name, rows in encoded.items()},
            label=labels.encode(pair.target) if labelled else math.nan,
            is_cut=row in cut,
        )
        for row, pair in enumerate(pairs)
    ]


def _check_label(place: str, label: str, labels: Labels) -> None:
    if labels.words and label not in labels.words:
        raise ValueError(
            f"{place}: label {label!r} is none of the {len(labels.words)} that are known"
            f" ({', '.join(labels.words[:3])}, ...)"
        )
    if not labels.words and read_number(label) is None:
        raise ValueError(f"{place}: label {label!r} is no number, as task.metric=correlation has them; correct the row")


def _find_longer(
    rows: Sequence[int],
    sentences: Sequence[str],
    seconds: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> set[int]:
    """Those of `rows` that are longer than `seq_len` where nothing cuts them."""
    if not rows:
        return set()
    others = None if seconds is None else [seconds[row] for row in rows]
    whole = tokenizer([sentences[row] for row in rows], others, verbose=False)["input_ids"]
    return {row for row, tokens in zip(rows, whole, strict=True) if len(tokens) > seq_len}


def open_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerBase:
    """ValueError where the directory has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"encoder.checkpoint={config.checkpoint} has no tokenizer ({reason})") from None
    return tokenizer
