"""Files of (context, target) pairs, read row by row: the E2E text form, the official E2E CSV, and JSON lines."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SEPARATOR = "||"
_CSV_COLUMNS = ("mr", "ref")
_MEANING = re.compile(r"([^\[\],]+)\[([^\[\]]+)\]")
_MEANINGS = re.compile(rf"{_MEANING.pattern}(,\s*{_MEANING.pattern})*")
_SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SPACED_SIGNS = re.compile("([\u00a3-])")


@dataclass(frozen=True, slots=True)
class Pair:
    """One example as text, and the line of its file where it starts, from 1."""

    line: int
    context: str
    target: str


class BadRows:
    """What becomes of one file's bad rows: the first is an error, or all are counted by reason."""

    def __init__(self, path: str, on_bad_row: str) -> None:
        self.path = path
        self.skip = on_bad_row == "skip"
        self.counts: Counter[str] = Counter()

    def add(self, line: int, reason: str, detail: str = "") -> None:
        """ValueError `file:line: reason (detail)` unless bad rows are skipped."""
        if not self.skip:
            explained = f"{reason} ({detail})" if detail else reason
            raise ValueError(f"{self.path}:{line}: {explained}; correct the row or set data.on_bad_row=skip")
        self.counts[reason] += 1


class _BadRow(Exception):
    """Raised by what parses one row; never leaves this file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


def read_pairs(content: bytes, file_format: str, bad: BadRows) -> Iterator[Pair]:
    """The good rows of a file in order; bad ones go to `bad`. A byte-order mark and CRLF line ends are accepted.

    Contexts and targets are stripped of outer white space. ValueError where a CSV has not the right columns.
    """
    # Broken bytes become lone surrogates, so that the row they stand in can be told.
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if file_format == "e2e_csv":
        return _read_csv(text, bad)
    return _read_lines(text, {"e2e_text": _parse_e2e_text, "jsonl": _parse_json}[file_format], bad)


def _read_lines(text: str, parse: Callable[[str], tuple[str, str]], bad: BadRows) -> Iterator[Pair]:
    for line, row in enumerate(io.StringIO(text, newline="\n"), 1):
        try:
            _check_text(row)
            if not row.strip():
                raise _BadRow("blank line")
            context, target = parse(row)
        except _BadRow as problem:
            bad.add(line, problem.reason, problem.detail)
        else:
            yield Pair(line, context, target)


def _read_csv(text: str, bad: BadRows) -> Iterator[Pair]:
    """A quoted field may hold line ends; a row's line is the one where it starts."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    _check_header(rows, bad.path)
    while True:
        line = rows.line_num + 1
        try:
            context, target = _parse_csv_row(next(rows))
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(line, "broken quoting", str(error))
        except _BadRow as problem:
            bad.add(line, problem.reason, problem.detail)
        else:
            yield Pair(line, context, target)


def _check_header(rows: Iterator[list[str]], path: str) -> None:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"{path}:1: broken quoting ({error}); format e2e_csv needs the header 'mr,ref'") from None
    if tuple(name.strip().lower() for name in header) != _CSV_COLUMNS:
        raise ValueError(f"{path}:1: the header is {','.join(header)!r}; format e2e_csv needs 'mr,ref'")


def _parse_e2e_text(row: str) -> tuple[str, str]:
    fields = row.split(_SEPARATOR)
    if len(fields) != 2:
        raise _BadRow("no separator" if len(fields) == 1 else "several separators", f"one {_SEPARATOR!r} is expected")
    return _check_pair(*fields, needs_context=True)


def _parse_csv_row(fields: list[str]) -> tuple[str, str]:
    if not fields:
        raise _BadRow("blank line")
    if len(fields) != len(_CSV_COLUMNS):
        raise _BadRow("wrong number of fields", f"{len(fields)} instead of {len(_CSV_COLUMNS)}")
    for field in fields:
        _check_text(field)
    context, target = _check_pair(*fields, needs_context=True)
    return _write_meaning(context), target


def _parse_json(row: str) -> tuple[str, str]:
    """An empty context is allowed: then the target is plain text to be learnt."""
    try:
        record = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise _BadRow("broken JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _BadRow("wrong type", f"a JSON object is expected, not {type(record).__name__}")
    texts = []
    for key in ("context", "target"):
        if key not in record:
            raise _BadRow("missing key", repr(key))
        if not isinstance(record[key], str):
            raise _BadRow("wrong type", f"{key!r} is {type(record[key]).__name__}, not a string")
        _check_text(record[key])
        texts.append(record[key])
    return _check_pair(*texts, needs_context=False)


def _write_meaning(meaning: str) -> str:
    """`name[Aromi], eatType[pub], priceRange[less than \u00a320]` in the form of the E2E text files:
    `name : Aromi | Type : pub | price : less than \u00a3 20`.
    """
    if not _MEANINGS.fullmatch(meaning):
        raise _BadRow("broken meaning representation", f"{meaning!r} is not of the form 'slot[value], slot[value]'")
    slots = []
    for name, value in _MEANING.findall(meaning):
        spaced = " ".join(_SPACED_SIGNS.sub(r" \1 ", value).split())
        slots.append(f"{_SLOT_NAMES.get(name.strip(), name.strip())} : {spaced}")
    return " | ".join(slots)


def _check_pair(context: str, target: str, *, needs_context: bool) -> tuple[str, str]:
    context, target = context.strip(), target.strip()
    if needs_context and not context:
        raise _BadRow("empty context")
    if not target:
        raise _BadRow("empty target")
    return context, target


def _check_text(text: str) -> None:
    """Lone surrogates stand for bytes that are not UTF-8, or come from JSON's escapes; no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow("broken UTF-8") from None
