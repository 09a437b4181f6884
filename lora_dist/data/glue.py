"""GLUE's nine tasks in the TSV files that GLUE hands out: sentences -> the label, in words. https://gluebenchmark.com"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from lora_dist.data.rows import BadRow, BadRows, Pair, Texts
from lora_dist.data.tables import read_table


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueTask:
    """Which columns of a file are the input, under which names in the context, and what its labels mean."""

    columns: dict[str, str]
    """Name in the context -> column."""
    label: str = "label"
    words: dict[str, str] = field(default_factory=dict)
    """Label in the file -> target; empty where the file has words, or a number (STS-B), already."""
    header: tuple[str, ...] | None = None
    """Of a file that has none (CoLA's but for its test file)."""


_NLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
_RTE = {"entailment": "entailment", "not_entailment": "not_entailment"}
_SAME = {"0": "different", "1": "equivalent"}
_SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        columns={"sentence": "sentence"},
        words={"0": "unacceptable", "1": "acceptable"},
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(columns={"sentence": "sentence"}, words={"0": "negative", "1": "positive"}),
    "mrpc": GlueTask(columns={"sentence1": "#1 String", "sentence2": "#2 String"}, label="Quality", words=_SAME),
    "qqp": GlueTask(columns={"question1": "question1", "question2": "question2"}, label="is_duplicate", words=_SAME),
    "stsb": GlueTask(columns=_SENTENCES, label="score"),
    "mnli": GlueTask(columns={"premise": "sentence1", "hypothesis": "sentence2"}, label="gold_label", words=_NLI),
    "qnli": GlueTask(columns={"question": "question", "sentence": "sentence"}, words=_RTE),
    "rte": GlueTask(columns=_SENTENCES, words=_RTE),
    "wnli": GlueTask(columns=_SENTENCES, words={"0": "not_entailment", "1": "entailment"}),
}


SENTENCE_END = "\t"
"""Between the two sentences of `read_sentences`: no cell of a TSV file holds one."""


def read_glue(name: str, text: str, bad: BadRows, *, labelled: bool = True) -> Iterator[Pair]:
    """`premise : ... | hypothesis : ...` -> `entailment`. A row without a known label is a bad row.

    Where not `labelled` targets are empty, and the file may be GLUE's test file, which has none.
    """

    def join(parts: Mapping[str, str]) -> str:
        return " | ".join(f"{role} : {part}".strip() for role, part in parts.items())

    return _read(name, text, bad, join, labelled=labelled)


def read_sentences(name: str, text: str, bad: BadRows, *, labelled: bool = True) -> Iterator[Pair]:
    """The same rows with the one or two sentences as they stand, as an encoder reads them; one of two may be empty, as
    in a few rows of QQP.
    """
    return _read(name, text, bad, lambda parts: SENTENCE_END.join(parts.values()), labelled=labelled)


def _read(
    name: str, text: str, bad: BadRows, join: Callable[[Mapping[str, str]], str], *, labelled: bool
) -> Iterator[Pair]:
    task = TASKS[name]

    def parse(cells: Mapping[str, str]) -> Texts:
        parts = {role: cells[column].strip() for role, column in task.columns.items()}
        if not any(parts.values()):
            raise BadRow("empty context")
        return join(parts), _read_label(task, cells[task.label].strip()) if labelled else ""

    columns = [*task.columns.values(), *([task.label] if labelled else [])]
    header = None if _has_header(task, text) else task.header
    return read_table(text, columns, parse, bad, quoted=False, header=header)


def _has_header(task: GlueTask, text: str) -> bool:
    """CoLA's test file has one, its others have none."""
    return set(task.columns.values()) <= set(text.partition("\n")[0].rstrip("\r").split("\t"))


def _read_label(task: GlueTask, label: str) -> str:
    if task.words:
        if label not in task.words:
            raise BadRow("unlabeled row", f"{task.label}={label!r} is not one of {', '.join(task.words)}")
        return task.words[label]
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("unlabeled row", f"{task.label}={label!r} is no number")
    return f"{number:g}"
