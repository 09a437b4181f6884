"""Contexts to generate from: out of files of examples or plain text, to tokens, and texts out of tokens again."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from lora_dist.data.conversations import parse_question, write_question
from lora_dist.data.documents import read_json_rows
from lora_dist.data.examples import tokenize_texts
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRow, BadRows, check_text
from lora_dist.data.tokenizer import find_start_tokens
from lora_dist.prefix.slots import list_slots
from lora_dist.prefix_config import PrefixConfig

_SEPARATOR = "||"


@dataclass(frozen=True, slots=True)
class Context:
    """One row's context, and the adapter that it names."""

    text: str
    adapter: str | None = None


def read_contexts(content: bytes, file_format: str, path: str) -> list[Context]:
    """Every row's context in order; targets are left out. ValueError `file:line: ...` at the first bad row.

    `file_format` as in GenerateOptions.format.
    """
    if file_format == "auto":
        file_format = _guess_format(content, path)
    if file_format in ("e2e_text", "e2e_csv"):
        return [Context(pair.context) for pair in read_pairs(content, file_format, BadRows(path, "error"))]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    parse = {"jsonl": _parse_json, "chat": _parse_chat}.get(file_format, _parse_text)
    rows: Iterable[tuple[int, str]] = enumerate(io.StringIO(text, newline="\n"), 1)
    if parse is not _parse_text and text.lstrip().startswith("["):
        rows = read_json_rows(text, lambda line, value: (line, json.dumps(value)), BadRows(path, "error"))
    contexts = [parse(row.strip(), f"{path}:{line}") for line, row in rows]
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
    for ending, known in ((".jsonl", "jsonl"), (".csv", "e2e_csv")):
        if path.endswith(ending):
            return known
    return "e2e_text" if _SEPARATOR.encode() in content.partition(b"\n")[0] else "text"


def _parse_text(row: str, place: str) -> Context:
    if not row:
        raise ValueError(f"{place}: blank line; a context a line is expected")
    return Context(row)


def _parse_chat(row: str, place: str) -> Context:
    """The row's conversation as `write_question` writes it."""
    try:
        asked = parse_question(row)
    except BadRow as problem:
        raise ValueError(f"{place}: {problem.reason} ({problem.detail}); correct the row") from None
    record = json.loads(row)
    return Context(write_question(asked.messages, asked.tools), _take_adapter(record, place))


def _take_adapter(record: Mapping[str, object], place: str) -> str | None:
    adapter = record.get("adapter")
    if not isinstance(adapter, str | None):
        raise ValueError(f"{place}: 'adapter' is {adapter!r}, neither an adapter's directory nor null")
    return adapter


def _parse_json(row: str, place: str) -> Context:
    try:
        record = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: broken JSON ({error})") from None
    context = record.get("context") if isinstance(record, dict) else None
    if not isinstance(context, str):
        raise ValueError(f"{place}: a JSON object with the string 'context' is expected")
    return Context(check_context(context, place).strip(), _take_adapter(record, place))


def check_context(text: str, place: str) -> str:
    """The text. ValueError, naming `place`, where it holds half a character, which no tokenizer takes."""
    try:
        check_text(text)
    except BadRow as problem:
        raise ValueError(f"{place}: {problem.reason}; correct the text") from None
    return text
