"""A file of JSON lines that is answered row by row, in any order: what is answered outlives its writer.

`NAME.about.json` says what the rows answer and is there before the first of them. Until all are known they are in
`.NAME.rows`; then `NAME` appears whole, in the rows' order. One process reads and writes.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.checkpoint.identity import check_same
from lora_dist.files.directories import read_json
from lora_dist.writing import name_when_full, write_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFile:
    """The texts of rows 0 to `num_rows` - 1, kept in a file as they come."""

    path: Path
    identity: Mapping[str, Any]
    """JSON-able; what decides the texts. Rows are only taken from a file that was begun with an equal one."""
    num_rows: int

    @property
    def about_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.about.json")

    @property
    def rows_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.rows")

    def begin(self) -> dict[int, str]:
        """The rows that are known already; a line that a killed writer has left unfinished is cut off.

        ValueError where the file answers something else, naming the first difference and both values, and where it is
        no file of ours.
        """
        if not self.about_path.exists():
            if found := next((path for path in (self.path, self.rows_path) if path.exists()), None):
                raise ValueError(f"{found} exists already; give a new file")
            write_lines(self.about_path, [self.identity])
            return {}
        check_same(self.identity, read_json(self.about_path), self.about_path)
        if self.path.exists():
            # As bytes, whose lines end at a newline alone: a text may hold what Unicode calls the end of a line.
            return dict(enumerate(self._parse_finished(self.path.read_bytes().splitlines())))
        return self._read_rows() if self.rows_path.exists() else {}

    def append(self, texts: Mapping[int, str]) -> None:
        """Rows that stay known whatever happens to this process afterwards."""
        with name_when_full(self.rows_path), self.rows_path.open("a", encoding="utf-8") as file:
            for row, text in texts.items():
                file.write(json.dumps({"row": row, "text": text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All rows in order; each line holds its row's `text`."""
        write_lines(self.path, lines)
        self.rows_path.unlink(missing_ok=True)

    def _parse_finished(self, lines: Sequence[bytes]) -> list[str]:
        texts = []
        for number, line in enumerate(lines, 1):
            texts.append(_take_text(_parse(line), f"{self.path}:{number}"))
        if len(texts) != self.num_rows:
            raise ValueError(f"{self.path} has {len(texts)} rows instead of {self.num_rows}; remove it to start over")
        return texts

    def _read_rows(self) -> dict[int, str]:
        raw = self.rows_path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.rows_path, len(whole))
        known: dict[int, str] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            place, record = f"{self.rows_path}:{number}", _parse(line)
            row = record.get("row") if isinstance(record, dict) else None
            if not (isinstance(row, int) and 0 <= row < self.num_rows):
                raise ValueError(f"{place} holds no row of {self.num_rows}; remove the file to start over")
            known[row] = _take_text(record, place)
        return known


def _parse(line: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _take_text(record: Any, place: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{place} holds no text; remove the file to start over")
    return text
