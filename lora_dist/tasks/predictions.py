"""Files of outputs, anyone's: a line each, or a column of TSV, CSV or JSON lines; matched to a task's items."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_dist.data.readers import write_meaning
from lora_dist.data.rows import BadRow, read_file, take_text
from lora_dist.data.tables import open_rows, take_cells, take_header
from lora_dist.tasks.items import Item

_OUTPUT_NAMES = ("prediction", "output", "hypothesis")
_OUTPUT_KEYS = (*_OUTPUT_NAMES, "text")
"""In JSON lines, which `lora-dist generate` writes with `text`; a table's column `text` is as likely the input."""
_CONTEXT_NAMES = ("context", "mr", "source")
_REMEDY = "correct the file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One output, the line of its file, and the context it answers where the file says so."""

    line: int
    text: str
    context: str | None = None


def load_predictions(path: str, items: Sequence[Item], *, may_be_empty: bool) -> list[str]:
    """One output for each item, in the items' order: matched by context where the file has a column of it.

    ValueError with file and line for a row that is broken or answers nothing, for one too many and for one missing.
    """
    predictions = list(_read_predictions(path))
    for prediction in predictions:
        if not prediction.text and not may_be_empty:
            raise ValueError(f"{path}:{prediction.line}: unlabeled row, the output is empty; {_REMEDY}")
    if _have_contexts(path, predictions):
        predictions = _match_contexts(path, predictions, items)
    _check_number(path, predictions, items)
    return [prediction.text for prediction in predictions]


def _have_contexts(path: str, predictions: Sequence[Prediction]) -> bool:
    """ValueError where some rows have one and others not: by order or by context is for the whole file."""
    given = [prediction.line for prediction in predictions if prediction.context is not None]
    missing = [prediction.line for prediction in predictions if prediction.context is None]
    if given and missing:
        raise ValueError(f"{path}:{missing[0]}: no context, and line {given[0]} has one; give it in all or in none")
    return bool(given)


def _read_predictions(path: str) -> Iterator[Prediction]:
    # Broken bytes become lone surrogates, so that the line they stand in can be told.
    text = read_file("predictions", path).decode("utf-8-sig", errors="surrogateescape")
    text = text.replace("\r\r\n", "\n")  # Windows' line ends written as text once more, as one E2E system's are
    suffix = Path(path).suffix.lower()
    if suffix in (".tsv", ".csv"):
        return _read_columns(text, path, "\t" if suffix == ".tsv" else ",")
    return _read_json_lines(text, path) if suffix == ".jsonl" else _read_plain_lines(text, path)


def _read_plain_lines(text: str, path: str) -> Iterator[Prediction]:
    for line, row in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        yield Prediction(line=line, text=_check(row, path, line))


def _read_json_lines(text: str, path: str) -> Iterator[Prediction]:
    for line, row in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        row = _check(row, path, line)
        try:
            record = json.loads(row)
            keys = record if isinstance(record, dict) else {}
            name = _find_column(keys, _OUTPUT_KEYS) or _OUTPUT_NAMES[0]
            context = _find_column(keys, _CONTEXT_NAMES)
            given = None if context is None else take_text(record, context).strip()
            yield Prediction(line=line, text=take_text(record, name).strip(), context=given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: broken JSON ({error}); {_REMEDY}") from None
        except BadRow as problem:
            raise ValueError(f"{path}:{line}: {problem.reason} ({problem.detail}); {_REMEDY}") from None


def _read_columns(text: str, path: str, delimiter: str) -> Iterator[Prediction]:
    rows = open_rows(text, quoted=True, delimiter=delimiter)
    header = take_header(rows, [], path)
    output, context = (_find_column(header, names) for names in (_OUTPUT_NAMES, _CONTEXT_NAMES))
    if output is None:
        raise ValueError(
            f"{path}:1: no column of outputs, the header is {delimiter.join(header)!r}; call it {_OUTPUT_NAMES[0]}"
        )
    for line, row in rows:
        try:
            cells = take_cells(row, header)
        except BadRow as problem:
            detail = f" ({problem.detail})" if problem.detail else ""
            raise ValueError(f"{path}:{line}: {problem.reason}{detail}; {_REMEDY}") from None
        given = None if context is None else cells[context].strip()
        yield Prediction(line=line, text=cells[output].strip(), context=given)


def _find_column(names: Sequence[str] | Mapping[str, object], wanted: Sequence[str]) -> str | None:
    """The name there, in whatever case, that comes first in `wanted`."""
    lowered = {name.lower(): name for name in reversed(list(names))}
    return next((lowered[name] for name in wanted if name in lowered), None)


def _check(row: str, path: str, line: int) -> str:
    try:
        row.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path}:{line}: broken UTF-8; {_REMEDY}") from None
    return row.strip()


def _match_contexts(path: str, predictions: Sequence[Prediction], items: Sequence[Item]) -> list[Prediction]:
    """The outputs in the items' order; items of one context, e.g. a question asked twice, take them as they come.

    One output may stand there more often than needed, as where a context was generated from once a reference.
    """
    waiting: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        waiting.setdefault(item.context, []).append(index)
    matched: dict[int, Prediction] = {}
    taken: dict[str, set[str]] = {}
    for prediction in predictions:
        context = _normalize(prediction.context or "", waiting)
        if context not in waiting:
            raise ValueError(f"{path}:{prediction.line}: the references have no context {prediction.context!r}")
        if not waiting[context]:
            if prediction.text in taken[context]:
                continue
            raise ValueError(f"{path}:{prediction.line}: a second, other output for {prediction.context!r}; keep one")
        matched[waiting[context].pop(0)] = prediction
        taken.setdefault(context, set()).add(prediction.text)
    missing = [index for index in range(len(items)) if index not in matched]
    if missing:
        context = items[missing[0]].context
        raise ValueError(
            f"{path}:{predictions[-1].line}: {len(missing)} of {len(items)} contexts have no output,"
            f" the first {context!r}; {_REMEDY}"
        )
    return [matched[index] for index in range(len(items))]


def _normalize(context: str, known: Mapping[str, object]) -> str:
    """E2E's published `name[Aromi], eatType[pub]` and SAMSum's line ends in the form that the readers give contexts."""
    for spelt in (context, context.replace("\r\n", "\n")):
        if spelt in known:
            return spelt
    try:
        return write_meaning(context)
    except BadRow:
        return context


def _check_number(path: str, predictions: Sequence[Prediction], items: Sequence[Item]) -> None:
    if len(predictions) == len(items):
        return
    last = predictions[-1].line if predictions else 1
    raise ValueError(
        f"{path}:{last}: {len(predictions)} outputs for {len(items)} items; one for each is expected, in the"
        " references' order: for each row where labels, numbers or queries are scored, elsewhere for each context"
    )
