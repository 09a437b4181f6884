"""JSON read entry by entry, each with the line where it starts, so that a bad one can be named."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lora_dist.data.rows import BadRow, BadRows, Pair, check_text

_Row = TypeVar("_Row")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def read_document(
    text: str, member: str | None, parse: Callable[[Any], Iterable[tuple[str, ...]]], bad: BadRows
) -> Iterator[Pair]:
    """The pairs that `parse` makes of each entry; it returns the fields of a Pair after the line.

    The document is an array, or an object whose `member` is one. ValueError with the line where it is broken.
    """
    for number, (line, entry) in enumerate(_list_entries(text, member, bad.path), 1):
        try:
            pairs = [Pair(line, *fields) for fields in parse(entry)]
        except BadRow as problem:
            detail = f"entry {number}: {problem.detail}" if problem.detail else f"entry {number}"
            bad.add(line, problem.reason, detail)
        else:
            yield from pairs


def read_json_rows(text: str, parse: Callable[[int, Any], _Row], bad: BadRows) -> Iterator[_Row]:
    """What `parse` makes of (line, value) of each row: of JSON lines, or of the entries of one JSON array."""
    is_array = text.lstrip().startswith("[")
    rows = _list_entries(text, None, bad.path) if is_array else enumerate(io.StringIO(text, newline="\n"), 1)
    for line, row in rows:
        try:
            parsed = parse(line, row if is_array else _parse_line(row))
        except BadRow as problem:
            bad.add(line, problem.reason, problem.detail)
        else:
            yield parsed


def list_members(text: str, path: str) -> list[str]:
    """The keys of the object that the document is; ValueError with the line where it is broken."""
    at = _skip_space(text, 0)
    document, _ = _decode(text, at, path)
    if not isinstance(document, dict):
        raise _build_error(text, at, path, "an object is expected")
    return list(document)


def _parse_line(row: str) -> Any:
    check_text(row)
    if not row.strip():
        raise BadRow("blank line")
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", str(error)) from None


def _list_entries(text: str, member: str | None, path: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of every entry of the array."""
    at, line, counted = _find_array(text, member, path), 1, 0
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        entry, at = _decode(text, at, path)
        yield line, entry
        at = _skip_space(text, at)
        if text[at : at + 1] not in (",", "]"):
            raise _build_error(text, at, path, "a comma or the array's end is expected")
        if text[at] == ",":
            at = _skip_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise _build_error(text, at, path, "another entry is expected behind the comma")
    if member is None and _skip_space(text, at + 1) < len(text):
        raise _build_error(text, _skip_space(text, at + 1), path, "the array has ended; one file holds one")


def _find_array(text: str, member: str | None, path: str) -> int:
    """Where the array's bracket stands."""
    at = _skip_space(text, 0)
    if member is not None:
        at = _find_member(text, at, member, path)
    if text[at : at + 1] != "[":
        what = "the document" if member is None else repr(member)
        raise _build_error(text, at, path, f"{what} is not an array")
    return at


def _find_member(text: str, at: int, member: str, path: str) -> int:
    """Where the value of the object's `member` starts."""
    if text[at : at + 1] != "{":
        raise _build_error(text, at, path, f"an object with the key {member!r} is expected")
    names, separator = [], "{"
    while separator != "}":
        name, at = _decode(text, _skip_space(text, at + 1), path)
        at = _skip_space(text, at)
        if text[at : at + 1] != ":":
            raise _build_error(text, at, path, "a colon is expected")
        at = _skip_space(text, at + 1)
        if name == member:
            return at
        names.append(str(name))
        at = _skip_space(text, _decode(text, at, path)[1])
        separator = text[at : at + 1]
        if separator not in (",", "}"):
            raise _build_error(text, at, path, "a comma or the object's end is expected")
    raise ValueError(f"{path}: no key {member!r}; there are {', '.join(names)}")


def _decode(text: str, at: int, path: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _build_error(text, error.pos, path, error.msg) from None
    except RecursionError:
        raise _build_error(text, at, path, "nested too deeply") from None


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _build_error(text: str, at: int, path: str, reason: str) -> ValueError:
    return ValueError(f"{path}:{text.count(chr(10), 0, at) + 1}: broken JSON ({reason}); correct the file")
