"""WikiSQL: whether a query says the same as the right one, and whether it fetches the same."""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lora_dist.data.wikisql import AGGREGATES, OPERATORS, Query, list_columns, parse_query
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item
from lora_dist.tasks.scores import ScoreRow

_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


class UnfitQuery(Exception):
    """The query cannot be run: a wrong answer, if it is a model's."""


def score_sql(task: TaskConfig, predictions: Sequence[str], items: Sequence[Item]) -> tuple[list[ScoreRow], list[str]]:
    """Logical-form accuracy and, with `task.database`, execution accuracy, times 100."""
    queries = [parse_query(text) for text in predictions]
    answers = [parse_query(item.references[0]) for item in items]
    right = sum(
        query is not None and answer is not None and query.logical_form == answer.logical_form
        for query, answer in zip(queries, answers, strict=True)
    )
    values: dict[str, float | None] = {"logical form": 100 * right / len(items)}
    unread = queries.count(None)
    notes = [f"{unread} of {len(items)} outputs are no query and count as wrong"] if unread else []
    if task.database is None:
        notes.append("execution accuracy needs WikiSQL's database: task.database=dev.db")
    else:
        values["execution"] = 100 * _count_same_results(task.database, queries, answers, items) / len(items)
    return [ScoreRow(label="outputs", values=values)], notes


def _count_same_results(
    database: str, queries: Sequence[Query | None], answers: Sequence[Query | None], items: Sequence[Item]
) -> int:
    same = 0
    with _open_database(database) as connection:
        for query, answer, item in zip(queries, answers, items, strict=True):
            assert answer is not None
            columns = list_columns(item.context)
            try:
                wanted = _execute(connection, item.part, columns, answer)
            except (UnfitQuery, sqlite3.Error) as error:
                raise ValueError(
                    f"task.database={database}: the reference of line {item.line} does not run ({error});"
                    " give the database of this split"
                ) from None
            try:
                same += query is not None and _execute(connection, item.part, columns, query) == wanted
            except (UnfitQuery, sqlite3.Error):
                continue
    return same


@contextmanager
def _open_database(path: str) -> Iterator[sqlite3.Connection]:
    """Read-only, so that a wrong path makes no empty database."""
    if not Path(path).is_file():
        raise ValueError(f"task.database={path} is no file; give WikiSQL's dev.db, test.db or train.db")
    with closing(sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)) as connection:
        yield connection


def _execute(connection: sqlite3.Connection, table: str, columns: Sequence[str], query: Query) -> list[object]:
    """The rows fetched, as WikiSQL's own evaluation fetches them: it lower-cases values, as its databases are, and
    gives all conditions on one column the value of the last of them.
    """
    name = f"table_{table.replace('-', '_')}"
    types = {row[1]: str(row[2]).lower() for row in connection.execute(f'PRAGMA table_info("{name}")')}
    if not types:
        raise UnfitQuery(f"no table {name}")
    terms, values = [], {}
    for column, operator, value in query.conditions:
        key = f"col{_find(column, columns)}"
        assert operator in OPERATORS
        terms.append(f"{key} {operator} :{key}")
        values[key] = _read_value(value.lower(), types.get(key, "text"))
    what = f"col{_find(query.column, columns)}"
    assert query.aggregate in AGGREGATES
    what = f"{query.aggregate}({what})" if query.aggregate else what
    where = f" WHERE {' AND '.join(terms)}" if terms else ""
    # Only numbered columns and words of closed lists are in the text; values are bound.
    return [row[0] for row in connection.execute(f'SELECT {what} FROM "{name}"{where}', values)]


def _find(column: str, columns: Sequence[str]) -> int:
    if column not in columns:
        raise UnfitQuery(f"no column {column!r}")
    return columns.index(column)


def _read_value(value: str, kind: str) -> str | float:
    """A number for a column of numbers: the first in the text, if it is not one as a whole."""
    if kind != "real":
        return value
    try:
        return float(value.replace(",", ""))
    except ValueError:
        found = _NUMBER.findall(value)
    if not found:
        raise UnfitQuery(f"{value!r} is no number")
    return float(found[0])
