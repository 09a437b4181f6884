"""Files of columns: CSV and TSV with a header, each row named by the line where it starts."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from lora_dist.data.rows import BadRow, BadRows, Pair, Texts, check_text

Cells = list[str] | BadRow
"""A row's cells, or why there are none."""
_LONGEST_CELL = 2**31 - 1
"""The csv module takes what is longer than its limit, 131,072 characters at first, for broken quoting."""


def read_table(
    text: str,
    columns: Sequence[str],
    parse: Callable[[Mapping[str, str]], Texts],
    bad: BadRows,
    *,
    quoted: bool,
    header: Sequence[str] | None = None,
) -> Iterator[Pair]:
    """The pair that `parse` makes of each row's cells, by column. `quoted`: CSV; else tabs, and quotes mean nothing.

    `header` is given for files without one. ValueError where it has not all `columns`; others may stand beside them.
    """
    rows = open_rows(text, quoted=quoted)
    header = header or take_header(rows, columns, bad.path)
    yield from read_rows(rows, header, parse, bad)


def read_rows(
    rows: Iterator[tuple[int, Cells]],
    header: Sequence[str],
    parse: Callable[[Mapping[str, str]], Texts],
    bad: BadRows,
) -> Iterator[Pair]:
    """`read_table` behind its header."""
    for line, cells in rows:
        try:
            texts = parse(take_cells(cells, header))
        except BadRow as problem:
            bad.add(line, problem.reason, problem.detail, num_lines=problem.num_lines)
        else:
            yield Pair(line, *texts)


def open_rows(text: str, *, quoted: bool, delimiter: str | None = None) -> Iterator[tuple[int, Cells]]:
    """(line, cells) of every row. A quoted cell may hold line ends."""
    if not quoted:
        for line, row in enumerate(io.StringIO(text, newline="\n"), 1):
            yield line, row.rstrip("\r\n").split("\t")
        return
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or ",", strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, _describe("broken quoting", str(error), reader.line_num - line + 1)


def take_header(rows: Iterator[tuple[int, Cells]], columns: Sequence[str], path: str) -> list[str]:
    """The first row's cells; ValueError where `columns` are not all among them, or where two are called alike."""
    _, cells = next(rows, (1, list[str]()))
    header = [] if isinstance(cells, BadRow) else [name.strip() for name in cells]
    repeated = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}:1: several columns are called {', '.join(repeated)}; rename all but one")
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path}:1: no column {', '.join(missing)}; the header is {','.join(header)!r}")
    return header


def take_cells(cells: Cells, header: Sequence[str]) -> dict[str, str]:
    """Cells by column; BadRow where there are more or fewer than columns, or where the text is broken."""
    if isinstance(cells, BadRow):
        raise cells
    if not any(cells):
        raise BadRow("blank line")
    if len(cells) != len(header):
        num_lines = 1 + sum(cell.count("\n") for cell in cells)
        raise _describe("wrong number of fields", f"{len(cells)} instead of {len(header)}", num_lines)
    for cell in cells:
        check_text(cell)
    return dict(zip(header, cells, strict=True))


def _describe(reason: str, detail: str, num_lines: int) -> BadRow:
    """A quote that nobody has closed takes in the rows behind it."""
    return BadRow(reason, detail if num_lines == 1 else f"{detail}, {num_lines} lines long", num_lines)
