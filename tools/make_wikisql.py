"""Writes WikiSQL's own form (train, dev and test.jsonl) from text2sql-data's packing of it.

    python tools/make_wikisql.py wikisql.json.bz2 DIRECTORY

https://github.com/jkkummerfeld/text2sql-data, data/wikisql.json.bz2, holds all 80,654 questions in 4 MB, but of a table
only the columns that its queries name. Those become the table's header here, so a schema is shorter than WikiSQL's own
and the task easier: say so beside a score. Columns are taken by name: the packing's numbers
are another table's where several tables share a query. Where several questions share one, a value that is not in the
question is not known; such a question is left out.
"""

import argparse
import bz2
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dist.data.wikisql import AGGREGATES, OPERATORS

_QUERY = re.compile(
    r"SELECT (?:(?P<aggregate>[A-Z]+) )?(?:TABLEalias0\.)?(?P<column>\S+)_FIELD FROM (?:TABLE AS TABLEalias0|table)"
    r"(?: WHERE (?P<where>.*))? ;"
)
# In five queries the packing has put its alias, or an operator that belongs to the value, before the value.
_CONDITION = re.compile(r'(?:TABLEalias0\.)?(\S+)_FIELD (\S+) (?:TABLEalias0 |< )?"?(var\d+)"?')
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question with its query, columns by name."""

    split: str
    table: str
    text: str
    aggregate: str
    column: str
    conditions: list[tuple[str, str, str]]

    @property
    def columns(self) -> list[str]:
        return [self.column, *(column for column, _, _ in self.conditions)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    questions = list(read_questions(json.loads(bz2.decompress(given.source.read_bytes()))))
    columns: dict[str, set[str]] = {}
    for question in questions:
        columns.setdefault(question.table, set()).update(question.columns)
    # In the alphabet's order: in the order of the questions, the first one's columns would stand in front.
    headers = {table: sorted(names) for table, names in columns.items()}
    print(f"{len(headers):,} tables, {fmean(map(len, headers.values())):.1f} columns on the mean")
    given.directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [write_row(one, headers[one.table]) for one in questions if one.split == split]
        (given.directory / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{split}: {len(rows):,} questions")


def read_questions(entries: list[dict[str, Any]]) -> Iterator[Question]:
    """Every sentence of every entry, with the entry's query and its own values."""
    for entry in entries:
        (sql,) = entry["sql"]
        found = _QUERY.fullmatch(sql)
        if found is None:
            raise ValueError(f"{sql!r} is of no known form")
        conditions = _CONDITION.findall(found["where"] or "")
        assert len(conditions) == len((found["where"] or "").split(" AND ")) * bool(found["where"]), sql
        example = {variable["name"]: variable["example"] for variable in entry["variables"]}
        for sentence in entry["sentences"]:
            values = {**(example if len(entry["sentences"]) == 1 else {}), **sentence["variables"]}
            if any(name not in values for _, _, name in conditions):
                continue
            yield Question(
                split=sentence["question-split"],
                table=sentence["table-id"],
                text=sentence["original"],
                aggregate=found["aggregate"] or "",
                column=name_column(found["column"]),
                conditions=[(name_column(column), operator, values[name]) for column, operator, name in conditions],
            )


def name_column(field: str) -> str:
    """`YEARS_IN_TORONTO` -> `years in toronto`."""
    return field.replace("_", " ").lower().strip()


def write_row(question: Question, header: list[str]) -> str:
    """The line of a file."""
    conditions = [[header.index(name), OPERATORS.index(how), value] for name, how, value in question.conditions]
    sql = {"sel": header.index(question.column), "conds": conditions, "agg": AGGREGATES.index(question.aggregate)}
    row = {"table_id": question.table, "question": question.text, "table": {"header": header}, "sql": sql}
    return json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
