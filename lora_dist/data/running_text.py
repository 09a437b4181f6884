"""Running text: whole documents, every token of which is learnt, cut into rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from lora_dist.data.documents import read_json_rows
from lora_dist.data.examples import Examples, join_examples, tokenize_texts
from lora_dist.data.rows import BadRow, BadRows, check_text, decode, take_text
from lora_dist.data.tokenizer import find_start_tokens

_JSON_ENDINGS = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and the line of its file where it starts, from 1."""

    line: int
    text: str


def read_documents(content: bytes, bad: BadRows, *, field: str = "text") -> Iterator[Document]:
    """Of JSON lines or a JSON array (.jsonl, .json) the rows' `field`; any other file is one document."""
    text = decode(content)
    if not bad.path.lower().endswith(_JSON_ENDINGS):
        yield from _check_whole(text, bad)
        return

    def parse(line: int, record: Any) -> Document:
        taken = take_text(record, field)
        if not taken.strip():
            raise BadRow("empty text")
        return Document(line, taken)

    yield from read_json_rows(text, parse, bad)


def encode_documents(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, *, seq_len: int) -> Examples:
    """Each document between the tokenizer's begin token, where it has one, and its end token, in rows of `seq_len`.

    A row's first token is the last one of the row before, so that every token but a document's first is learnt once.
    """
    start, end = find_start_tokens(tokenizer), [int(tokenizer.eos_token_id)]
    rows = []
    for one in tokenize_texts([document.text for document in documents], tokenizer, "documents"):
        tokens = np.array([*start, *one, *end], dtype=np.int32)
        rows += [tokens[first : first + seq_len + 1] for first in range(0, len(tokens) - 1, seq_len)]
    return join_examples(rows, [np.arange(len(row)) > 0 for row in rows])


def _check_whole(text: str, bad: BadRows) -> Iterator[Document]:
    try:
        check_text(text)
    except BadRow as problem:
        bad.add(1, problem.reason, problem.detail)
        return
    if text.strip():
        yield Document(1, text)
