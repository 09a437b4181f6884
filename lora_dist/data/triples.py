"""WebNLG 2017 and DART in JSON, as the LoRA authors' repository has them: triples -> a sentence that says them.

A context is `subject : property : object | subject : ...`. https://github.com/microsoft/LoRA, examples/NLG/data.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lora_dist.data.documents import read_document
from lora_dist.data.rows import BadRow, BadRows, Pair, check_pair, take_text

SEEN, UNSEEN = "seen", "unseen"
_SEEN_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter"),
    *("Food", "Monument", "SportsTeam", "University", "WrittenWork"),
)
"""Of the training set of the 2017 challenge; the test set has five more."""
_TRIPLE_KEYS = ("subject", "property", "object")

Fields = tuple[str, str, str]


def read_webnlg(text: str, bad: BadRows) -> Iterator[Pair]:
    """A pair for every lexicalisation marked good; `Pair.part` says whether its category is in the training set."""
    return read_document(text, "entries", _parse_webnlg, bad)


def read_dart(text: str, bad: BadRows) -> Iterator[Pair]:
    """A pair for every annotation; properties are lower-cased."""
    return read_document(text, None, _parse_dart, bad)


def _parse_webnlg(entry: Any) -> list[Fields]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise BadRow("wrong type", "an object with one key, the entry's number, is expected")
    (content,) = entry.values()
    part = SEEN if take_text(content, "category") in _SEEN_CATEGORIES else UNSEEN
    triples = [[take_text(triple, key) for key in _TRIPLE_KEYS] for triple in _take_list(content, "modifiedtripleset")]
    sentences = _take_list(content, "lexicalisations")
    good = [take_text(sentence, "lex") for sentence in sentences if take_text(sentence, "comment") == "good"]
    return [(*check_pair(_write_triples(triples), sentence), part) for sentence in good]


def _parse_dart(entry: Any) -> list[Fields]:
    if not isinstance(entry, dict):
        raise BadRow("wrong type", f"a JSON object is expected, not {type(entry).__name__}")
    triples = []
    for triple in _take_list(entry, "tripleset"):
        if not (isinstance(triple, list) and len(triple) == 3 and all(isinstance(part, str) for part in triple)):
            raise BadRow("wrong type", f"a triple is three strings, not {triple!r}")
        triples.append([triple[0], triple[1].lower(), triple[2]])
    sentences = [take_text(annotation, "text") for annotation in _take_list(entry, "annotations")]
    return [(*check_pair(_write_triples(triples), sentence), "") for sentence in sentences]


def _write_triples(triples: Sequence[Sequence[str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


def _take_list(record: Any, key: str) -> list[Any]:
    if not isinstance(record, dict) or not isinstance(record.get(key), list):
        raise BadRow("missing key", f"{key!r}, a list")
    values: list[Any] = record[key]
    return values
