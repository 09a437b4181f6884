"""Rows of data files: the pair each is read into, and what becomes of the bad ones."""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REMEDY = "correct the row or set data.on_bad_row=skip"

Texts = tuple[str, str]
"""Context and target."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One example as text, and the line of its file where it starts, from 1."""

    line: int
    context: str
    target: str
    part: str = ""
    """What a task tells its examples apart by: seen or unseen in WebNLG, the table in WikiSQL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Names of what a JSON row holds."""

    context: tuple[str, ...] = ("context",)
    """Several are put together, a blank line between them, and empty ones left out."""
    target: str = "target"

    def take(self, record: object) -> Texts:
        """Context, which may be empty, and target; BadRow where one is missing."""
        return check_pair(self.take_context(record), take_text(record, self.target), needs_context=False)

    def take_context(self, record: object) -> str:
        """Empty where all of it is; BadRow where a part is missing."""
        parts = [take_text(record, key).strip() for key in self.context]
        return "\n\n".join(part for part in parts if part)


PLAIN_FIELDS = Fields()


class BadRows:
    """What becomes of one file's bad rows: the first is an error, or all are counted by reason."""

    def __init__(self, path: str, on_bad_row: str, *, remedy: str = REMEDY) -> None:
        self.path = path
        self.skip = on_bad_row == "skip"
        self.remedy = remedy
        self.counts: Counter[str] = Counter()

    def add(self, line: int, reason: str, detail: str = "", *, num_lines: int = 1) -> None:
        """ValueError `file:line: reason (detail)` unless bad rows are skipped; all lines of a row are counted."""
        if not self.skip:
            explained = f"{reason} ({detail})" if detail else reason
            raise ValueError(f"{self.path}:{line}: {explained}; {self.remedy}")
        self.counts[reason] += 1
        if num_lines > 1:
            self.counts[f"further lines of {reason}"] += num_lines - 1

    def copy_empty(self) -> "BadRows":
        """For other rows of the same file."""
        return BadRows(self.path, "skip" if self.skip else "error", remedy=self.remedy)

    def describe(self) -> str:
        """The counts in words; empty where there are none."""
        return ", ".join(f"{count} x {reason}" for reason, count in sorted(self.counts.items()))


class BadRow(Exception):
    """Raised by what parses one row; never leaves the readers."""

    def __init__(self, reason: str, detail: str = "", num_lines: int = 1) -> None:
        self.reason, self.detail, self.num_lines = reason, detail, num_lines


def read_file(key: str, path: str) -> bytes:
    """ValueError, naming `key`, where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{key}={path} cannot be read ({reason}); give the path of a readable file") from None


def decode(content: bytes) -> str:
    """Broken bytes become lone surrogates, so that the row they stand in can be told; see check_text."""
    return content.decode("utf-8-sig", errors="surrogateescape")


def read_lines(text: str, parse: Callable[[str], Texts], bad: BadRows) -> Iterator[Pair]:
    """One pair a line."""
    return read_lines_of_many(text, lambda row: [parse(row)], bad)


def read_lines_of_many(text: str, parse: Callable[[str], Iterable[tuple[str, ...]]], bad: BadRows) -> Iterator[Pair]:
    """Several pairs a line, e.g. one a reference; `parse` returns the fields of a Pair after the line."""
    for line, row in enumerate(io.StringIO(text, newline="\n"), 1):
        try:
            check_text(row)
            if not row.strip():
                raise BadRow("blank line")
            pairs = [Pair(line, *fields) for fields in parse(row)]
        except BadRow as problem:
            bad.add(line, problem.reason, problem.detail)
        else:
            yield from pairs


def check_pair(context: str, target: str, *, needs_context: bool = True) -> Texts:
    """Both without outer white space; BadRow where one is empty that must not be."""
    context, target = context.strip(), target.strip()
    if needs_context and not context:
        raise BadRow("empty context")
    if not target:
        raise BadRow("empty target")
    return context, target


def check_text(text: str) -> None:
    """Lone surrogates stand for bytes that are not UTF-8, or come from JSON's escapes; no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("broken UTF-8") from None


def take_text(record: object, key: str) -> str:
    """The string `record[key]` of a JSON object; BadRow where it is missing or something else."""
    if not isinstance(record, dict):
        raise BadRow("wrong type", f"a JSON object is expected, not {type(record).__name__}")
    if key not in record:
        raise BadRow("missing key", repr(key))
    if not isinstance(record[key], str):
        raise BadRow("wrong type", f"{key!r} is {type(record[key]).__name__}, not a string")
    check_text(record[key])
    text: str = record[key]
    return text
