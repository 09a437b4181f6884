"""Contexts to generate from: out of files of examples or plain text, to tokens, and texts out of tokens again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lora_dist.data.conversations import take_question, write_question
from lora_dist.data.documents import read_json_rows
from lora_dist.data.examples import tokenize_texts
from lora_dist.data.glue import read_glue
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import PLAIN_FIELDS, BadRow, BadRows, Fields, check_text, decode, read_lines
from lora_dist.data.tokenizer import find_start_tokens
from lora_dist.data_config import FIELD_FORMATS
from lora_dist.prefix.slots import list_slots
from lora_dist.prefix_config import PrefixConfig

_SEPARATOR = "||"
_SUFFIXES = {".jsonl": "jsonl", ".csv": "e2e_csv"}
_SEVERAL_FORMATS = {
    ".json": "jsonl or chat (an array of rows), webnlg, dart, samsum, dialogsum or clinc150",
    ".tsv": "one of glue_cola ... glue_wnli",
}


@dataclass(frozen=True, slots=True)
class Context:
    """One row's context, and the adapter that it names."""

    text: str
    adapter: str | None = None


def read_contexts(
    content: bytes, file_format: str, path: str, *, split: str | None = None, fields: Fields = PLAIN_FIELDS
) -> list[Context]:
    """Every row's context in order; targets are left out. ValueError `file:line: ...` at the first bad row.

    `file_format` as in GenerateOptions.format; `split` and `fields` as in `read_pairs`.
    """
    if file_format == "auto":
        file_format = _guess_format(content, path)
    bad = BadRows(path, "error", remedy="correct the row")
    if file_format in FIELD_FORMATS:
        parse = _parse_chat if file_format == "chat" else partial(_parse_json, fields=fields)
        contexts = list(read_json_rows(decode(content), parse, bad))
    elif file_format == "text":
        contexts = [Context(pair.context) for pair in read_lines(decode(content), lambda row: (row.strip(), ""), bad)]
    elif file_format.startswith("glue_"):
        pairs = read_glue(file_format.removeprefix("glue_"), decode(content), bad, labelled=False)
        contexts = [Context(pair.context) for pair in pairs]
    else:
        contexts = [Context(pair.context) for pair in read_pairs(content, file_format, bad, split=split)]
    if not contexts:
        raise ValueError(f"{path} holds no context")
    return contexts


def encode_contexts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    end_context: bool,
    slots: PrefixConfig | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Tokens of each context, with the end token behind it where `end_context`, and the tokens that end an output.

    They begin as the examples of training do, and go on as those do up to the target; negative at slots.
    """
    start, end = find_start_tokens(tokenizer), [int(tokenizer.eos_token_id)]
    tokens = tokenize_texts(texts, tokenizer, "contexts")
    before_context, before_target = list_slots(slots)
    behind = [*end, *before_target] if end_context else []
    return [[*before_context, *start, *one, *behind] for one in tokens], end


def decode_texts(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast, *, strip: bool) -> list[str]:
    """The texts; with `strip` without the space before a target's first word."""
    texts = [str(tokenizer.decode(list(row), clean_up_tokenization_spaces=False)) for row in rows]
    return [text.strip() for text in texts] if strip else texts


def _guess_format(content: bytes, path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in _SEVERAL_FORMATS:
        raise ValueError(
            f"{path}: a {suffix} file may be of several formats; set generate.format to {_SEVERAL_FORMATS[suffix]}"
        )
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    return "e2e_text" if _SEPARATOR.encode() in content.partition(b"\n")[0] else "text"


def _parse_chat(line: int, record: Any) -> Context:
    """The row's conversation as `write_question` writes it."""
    asked = take_question(record)
    return Context(write_question(asked.messages, asked.tools), _take_adapter(record))


def _parse_json(line: int, record: Any, *, fields: Fields) -> Context:
    return Context(fields.take_context(record), _take_adapter(record))


def _take_adapter(record: Mapping[str, object]) -> str | None:
    adapter = record.get("adapter")
    if not isinstance(adapter, str | None):
        raise BadRow("wrong type", f"'adapter' is {adapter!r}, neither an adapter's directory nor null")
    return adapter


def check_context(text: str, place: str) -> str:
    """The text. ValueError, naming `place`, where it holds half a character, which no tokenizer takes."""
    try:
        check_text(text)
    except BadRow as problem:
        raise ValueError(f"{place}: {problem.reason}; correct the text") from None
    return text
