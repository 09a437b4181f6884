"""banking77 and CLINC150: an utterance -> the name of its intent, as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_dist.data.documents import list_members, read_document
from lora_dist.data.rows import BadRow, BadRows, Pair, Texts, check_pair, check_text
from lora_dist.data.tables import read_table


def read_banking77(text: str, bad: BadRows) -> Iterator[Pair]:
    """CSV with the columns text, category."""
    return read_table(text, ("text", "category"), _parse_banking77, bad, quoted=True)


def read_clinc150(text: str, split: str, bad: BadRows) -> Iterator[Pair]:
    """The array `split` (train, val, test, oos_train ...) of data_full.json: [utterance, intent] each."""
    return read_document(text, split, _parse_clinc150, bad)


def list_intents(text: str, path: str) -> list[str]:
    """Of all arrays of data_full.json, sorted; ValueError with file and line for a bad entry."""
    bad = BadRows(path, "error", remedy="correct the row")
    return sorted({pair.target for split in list_members(text, path) for pair in read_clinc150(text, split, bad)})


def _parse_banking77(cells: Mapping[str, str]) -> Texts:
    return check_pair(cells["text"], cells["category"])


def _parse_clinc150(entry: Any) -> list[Texts]:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)):
        raise BadRow("wrong type", "[utterance, intent] is expected")
    for text in entry:
        check_text(text)
    return [check_pair(*entry)]
