"""WikiSQL: columns of a table and a question -> the query, in a form that can be read back without the table.

A context is `[Player] [No.] [Position] Who wears number 42?`; its target
`SELECT [Player] FROM table WHERE [No.] = '42'`. https://github.com/salesforce/WikiSQL
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.data.rows import BadRow, BadRows, Pair, read_lines_of_many, take_text

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
"""In the order that the files number them; OP occurs in none."""

_NAME = r"\[((?:[^\]]|\]\])*)\]"
_VALUE = r"'((?:[^']|'')*)'"
_CONDITION = rf"{_NAME}\s*(=|>|<|OP)\s*{_VALUE}"
_SELECT = re.compile(
    rf"SELECT\s+(?:(?P<aggregate>[A-Z]+)\(\s*{_NAME}\s*\)|{_NAME})\s+FROM\s+table"
    rf"(?P<where>\s+WHERE\s+{_CONDITION}(?:\s+AND\s+{_CONDITION})*)?\s*;?",
    re.IGNORECASE,
)
_COLUMNS = re.compile(rf"(?:{_NAME}\s)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One query, columns by name."""

    column: str
    aggregate: str
    """One of AGGREGATES; empty for the column itself."""
    conditions: tuple[tuple[str, str, str], ...]
    """(column, operator, value), all of which hold."""

    @property
    def logical_form(self) -> tuple[str, str, frozenset[tuple[str, str, str]]]:
        """What the official evaluation compares: neither the order of conditions nor the case of values counts."""
        lowered = frozenset((column, operator, value.lower()) for column, operator, value in self.conditions)
        return self.column, self.aggregate, lowered


def read_wikisql(text: str, bad: BadRows) -> Iterator[Pair]:
    """A JSON object a line; the columns are those of `table.header` in it, or of the *.tables.jsonl beside the file.

    `Pair.part` is the table's id.
    """
    headers: dict[str, list[str]] = {}
    return read_lines_of_many(text, lambda row: [_parse_row(row, headers, bad.path)], bad)


def write_query(query: Query) -> str:
    """The target."""
    column = _write_name(query.column)
    what = f"{query.aggregate}({column})" if query.aggregate else column
    conditions = [f"{_write_name(name)} {operator} {_write_value(value)}" for name, operator, value in query.conditions]
    return f"SELECT {what} FROM table" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def parse_query(text: str) -> Query | None:
    """A target, or a model's attempt at one, read back; None where it is no query of this form."""
    found = _SELECT.fullmatch(text.strip())
    aggregate = (found.group("aggregate") or "").upper() if found else ""
    if found is None or aggregate not in AGGREGATES:
        return None
    conditions = re.findall(_CONDITION, found.group("where") or "", re.IGNORECASE)
    return Query(
        column=_read_name(found.group(2) if found.group(2) is not None else found.group(3)),
        aggregate=aggregate,
        conditions=tuple(
            (_read_name(name), operator.upper(), value.replace("''", "'")) for name, operator, value in conditions
        ),
    )


def list_columns(context: str) -> list[str]:
    """The columns that a context starts with, in the table's order; none where it starts otherwise."""
    found = _COLUMNS.match(context)
    return [_read_name(name) for name in re.findall(_NAME, found.group())] if found else []


def _parse_row(row: str, headers: dict[str, list[str]], path: str) -> tuple[str, str, str]:
    """The fields of a Pair after the line; `headers` keeps the file of tables once that is read."""
    try:
        record = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", str(error)) from None
    question, table = take_text(record, "question").strip(), take_text(record, "table_id")
    if not question:
        raise BadRow("empty context")
    columns = _name_columns(_take_header(record, table, headers, path))
    query = _name_query(record.get("sql"), columns)
    context = "".join(f"{_write_name(column)} " for column in columns) + question
    return context, write_query(query), table


def _take_header(record: Mapping[str, Any], table: str, headers: dict[str, list[str]], path: str) -> list[Any]:
    own = record.get("table")
    if isinstance(own, dict) and isinstance(own.get("header"), list):
        header: list[Any] = own["header"]
        return header
    if not headers:
        headers.update(_read_headers(path))
    if table not in headers:
        raise BadRow("unknown table", f"{table!r} is not in {_find_tables(path)}")
    return headers[table]


def _find_tables(path: str) -> Path:
    return Path(path).with_suffix(".tables.jsonl")


def _read_headers(path: str) -> dict[str, list[str]]:
    tables = _find_tables(path)
    try:
        rows = tables.read_bytes().splitlines()
        records = [json.loads(row) for row in rows if row]
        return {record["id"]: record["header"] for record in records}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{tables}: the columns of {path}'s tables cannot be read from it ({error!r});"
            " put WikiSQL's file of tables beside the questions, or a key table.header into each row"
        ) from None


def _name_columns(header: Sequence[Any]) -> list[str]:
    """One line each, and no two alike: the second `Name` of a table is called `Name (2)`."""
    names: list[str] = []
    for column in header:
        name = flat = " ".join(str(column).split())
        count = 2
        while name in names:
            name, count = f"{flat} ({count})", count + 1
        names.append(name)
    return names


def _name_query(sql: Any, columns: Sequence[str]) -> Query:
    """The numbered columns, operators and aggregates of a row by name."""
    try:
        conditions = [(columns[_index(at)], OPERATORS[_index(how)], _flatten(value)) for at, how, value in sql["conds"]]
        column, aggregate = columns[_index(sql["sel"])], AGGREGATES[_index(sql["agg"])]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise BadRow("broken query", f"{sql!r} of {len(columns)} columns: {error!r}") from None
    return Query(column=column, aggregate=aggregate, conditions=tuple(conditions))


def _index(number: object) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no index")
    return number


def _flatten(value: object) -> str:
    return " ".join(str(value).split())


def _write_name(name: str) -> str:
    return f"[{name.replace(']', ']]')}]"


def _read_name(name: str) -> str:
    return name.replace("]]", "]")


def _write_value(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
