"""Files of columns: CSV and TSV with a header, each row named by the line where it starts."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from lora_dist.data.rows import BadRow, BadRows, Pair, Texts, check_text


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
    for line, cells in rows:
        try:
            texts = parse(take_cells(cells, header))
        except BadRow as problem:
            bad.add(line, problem.reason, problem.detail)
        else:
            yield Pair(line, *texts)


Cells = list[str] | BadRow
"""A row's cells, or why there are none."""


def open_rows(text: str, *, quoted: bool, delimiter: str | None = None) -> Iterator[tuple[int, Cells]]:
    """(line, cells) of every row. A quoted cell may hold line ends."""
    if not quoted:
        for line, row in enumerate(io.StringIO(text, newline="\n"), 1):
            yield line, row.rstrip("\r\n").split("\t")
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or ",", strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadRow("broken quoting", str(error))


def take_header(rows: Iterator[tuple[int, Cells]], columns: Sequence[str], path: str) -> list[str]:
    """The first row's cells; ValueError where `columns` are not all among them."""
    _, cells = next(rows, (1, list[str]()))
    header = [] if isinstance(cells, BadRow) else [name.strip() for name in cells]
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
        raise BadRow("wrong number of fields", f"{len(cells)} instead of {len(header)}")
    for cell in cells:
        check_text(cell)
    return dict(zip(header, cells, strict=True))
