"""Files of examples, read row by row into pairs of (context, target): one reader a format."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from lora_dist.data import classification, conversations, dialogues, glue, triples, wikisql
from lora_dist.data.documents import read_json_rows
from lora_dist.data.rows import (
    PLAIN_FIELDS,
    BadRow,
    BadRows,
    Fields,
    Pair,
    Texts,
    check_pair,
    decode,
    read_lines,
)
from lora_dist.data.tables import Cells, open_rows, read_rows

_SEPARATOR = "||"
_CSV_COLUMNS = ("mr", "ref")
_MEANING = re.compile(r"([^\[\],]+)\[([^\[\]]+)\]")
_MEANINGS = re.compile(rf"{_MEANING.pattern}(,\s*{_MEANING.pattern})*")
_SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SPACED_SIGNS = re.compile("([\u00a3-])")

Reader = Callable[[str, BadRows], Iterator[Pair]]


def read_pairs(
    content: bytes, file_format: str, bad: BadRows, *, split: str | None = None, fields: Fields = PLAIN_FIELDS
) -> Iterator[Pair]:
    """The good rows of a file in order; bad ones go to `bad`. A byte-order mark and CRLF line ends are accepted.

    Contexts and targets are stripped of outer white space. `split` names the part of a file that holds several,
    `fields` what rows of jsonl and chat hold. ValueError where a file has not the right columns or is no JSON document.
    """
    text = decode(content)
    if file_format == "clinc150":
        if split is None:
            raise ValueError(f"{bad.path}: a clinc150 file holds several splits; name one, e.g. test")
        return classification.read_clinc150(text, split, bad)
    if split is not None:
        raise ValueError(
            f"{bad.path}: a file in format {file_format} holds one split, so there is no {split!r} in it; use null"
        )
    if file_format == "jsonl":
        return read_json_rows(text, lambda line, record: Pair(line, *fields.take(record)), bad)
    if file_format == "chat":
        return conversations.read_questions(text, bad, fields)
    return _READERS[file_format](text, bad)


def _read_csv(text: str, bad: BadRows) -> Iterator[Pair]:
    """A quoted field may hold line ends; a row's line is the one where it starts."""
    rows = open_rows(text, quoted=True)
    _check_header(rows, bad.path)
    yield from read_rows(rows, _CSV_COLUMNS, _parse_csv_row, bad)


def _check_header(rows: Iterator[tuple[int, Cells]], path: str) -> None:
    _, cells = next(rows, (1, list[str]()))
    if isinstance(cells, BadRow):
        raise ValueError(f"{path}:1: {cells.reason} ({cells.detail}); format e2e_csv needs the header 'mr,ref'")
    if tuple(name.strip().lower() for name in cells) != _CSV_COLUMNS:
        raise ValueError(f"{path}:1: the header is {','.join(cells)!r}; format e2e_csv needs 'mr,ref'")


def _parse_e2e_text(row: str) -> Texts:
    fields = row.split(_SEPARATOR)
    if len(fields) != 2:
        raise BadRow("no separator" if len(fields) == 1 else "several separators", f"one {_SEPARATOR!r} is expected")
    return check_pair(*fields)


def _parse_csv_row(cells: Mapping[str, str]) -> Texts:
    context, target = check_pair(*(cells[name] for name in _CSV_COLUMNS))
    return write_meaning(context), target


def write_meaning(meaning: str) -> str:
    """`name[Aromi], eatType[pub], priceRange[less than \u00a320]` in the form of the E2E text files:
    `name : Aromi | Type : pub | price : less than \u00a3 20`.
    """
    if not _MEANINGS.fullmatch(meaning):
        raise BadRow("broken meaning representation", f"{meaning!r} is not of the form 'slot[value], slot[value]'")
    slots = []
    for name, value in _MEANING.findall(meaning):
        spaced = " ".join(_SPACED_SIGNS.sub(r" \1 ", value).split())
        slots.append(f"{_SLOT_NAMES.get(name.strip(), name.strip())} : {spaced}")
    return " | ".join(slots)


_READERS: dict[str, Reader] = {
    "e2e_text": lambda text, bad: read_lines(text, _parse_e2e_text, bad),
    "e2e_csv": _read_csv,
    "webnlg": triples.read_webnlg,
    "dart": triples.read_dart,
    "wikisql": wikisql.read_wikisql,
    "samsum": dialogues.read_samsum,
    "dialogsum": dialogues.read_dialogsum,
    "banking77": classification.read_banking77,
    **{f"glue_{name}": partial(glue.read_glue, name) for name in glue.TASKS},
}
