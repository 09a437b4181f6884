"""SAMSum and DialogSum: a dialogue -> its summary. Neither may be handed on freely; the user brings the files."""

import ast
import json
from collections.abc import Iterator
from typing import Any

from lora_dist.data.documents import read_document
from lora_dist.data.rows import BadRow, BadRows, Pair, Texts, check_pair, read_lines_of_many, take_text

_SUMMARIES = ("summary", "summary1", "summary2", "summary3")
"""DialogSum's training and development rows have the first, its test rows the other three."""


def read_samsum(text: str, bad: BadRows) -> Iterator[Pair]:
    """The JSON array of {id, dialogue, summary}."""
    return read_document(text, None, _parse_samsum, bad)


def read_dialogsum(text: str, bad: BadRows) -> Iterator[Pair]:
    """An object a line, in JSON or as Python writes dictionaries, both of which are in circulation."""
    return read_lines_of_many(text, _parse_dialogsum, bad)


def _parse_samsum(entry: Any) -> list[Texts]:
    return [_join(entry, "summary")]


def _parse_dialogsum(row: str) -> list[Texts]:
    record = _load(row)
    if not isinstance(record, dict):
        raise BadRow("wrong type", f"an object is expected, not {type(record).__name__}")
    given = [key for key in _SUMMARIES if key in record]
    if not given:
        raise BadRow("missing key", "'summary', or 'summary1' to 'summary3'")
    return [_join(record, key) for key in given]


def _load(row: str) -> Any:
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:
        detail = f"{error}; nor is it one of Python's dictionaries"
    try:
        return ast.literal_eval(row.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise BadRow("broken JSON", detail) from None


def _join(record: Any, key: str) -> Texts:
    dialogue = take_text(record, "dialogue").replace("\r\n", "\n")
    return check_pair(dialogue, take_text(record, key))
