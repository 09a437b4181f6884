"""Rows of conversations: what was said by whom, before a chat template makes text of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lora_dist.data.documents import read_json_rows
from lora_dist.data.rows import PLAIN_FIELDS, BadRow, BadRows, Fields, Pair, check_text, take_text

Message = dict[str, Any]
"""`role` and `content`, `weight` 0 where an answer is not to be learnt, and what else a template knows of, e.g.
`tool_calls`."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row."""

    line: int
    """Of its file, where the row starts, from 1."""
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of functions that the assistant may call."""


def read_conversations(
    text: str, bad: BadRows, *, fields: Fields = PLAIN_FIELDS, system: str | None = None
) -> Iterator[Conversation]:
    """The good rows of JSON lines or of a JSON array; contents are stripped of outer white space.

    A row has `messages` ({role, content}), or `conversations` ({from, value}, ShareGPT's form), or the question and the
    answer under the names of `fields`. `system` goes in front of those without a system message.
    """
    return read_json_rows(text, partial(_parse, fields=fields, system=system), bad)


def read_questions(text: str, bad: BadRows, fields: Fields = PLAIN_FIELDS) -> Iterator[Pair]:
    """As pairs: the target is the last answer, the context all before it in the form of `write_question`."""

    def parse(line: int, record: Any) -> Pair:
        conversation = _parse(line, record, fields=fields, system=None)
        *before, answer = conversation.messages
        if answer["role"] != "assistant" or not answer["content"]:
            raise BadRow("no answer", "the last message must be the assistant's, with content")
        return Pair(line, write_question(before, conversation.tools), answer["content"])

    return read_json_rows(text, parse, bad)


def write_question(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """A conversation that awaits an answer, as one line of JSON; equal ones are equal lines."""
    content: dict[str, Any] = {"messages": list(messages)}
    if tools is not None:
        content["tools"] = list(tools)
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def parse_question(text: str, system: str | None = None) -> Conversation:
    """What `write_question` wrote, or a row of a file; BadRow where it is no conversation.

    An answer at its end is left out: it is what is asked for.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", str(error)) from None
    return take_question(record, system)


def take_question(record: Any, system: str | None = None) -> Conversation:
    """As `parse_question`, of a row that is parsed."""
    parsed = _parse(1, record, fields=PLAIN_FIELDS, system=system)
    messages = parsed.messages[:-1] if parsed.messages[-1]["role"] == "assistant" else parsed.messages
    if not messages:
        raise BadRow("no question", "there is no message before the assistant's")
    return replace(parsed, messages=messages)


def ask_user(text: str, system: str | None = None) -> Conversation:
    """A conversation of one question."""
    return Conversation(line=1, messages=_add_system([{"role": "user", "content": text}], system))


def _parse(line: int, record: Any, *, fields: Fields, system: str | None) -> Conversation:
    if not isinstance(record, dict):
        raise BadRow("wrong type", f"a JSON object is expected, not {type(record).__name__}")
    if "messages" in record:
        messages = [_check_message(one) for one in _take_list(record, "messages")]
    elif "conversations" in record:
        messages = [_check_message(_rename(one)) for one in _take_list(record, "conversations")]
        system = take_text(record, "system") if record.get("system") else system
    else:
        question, answer = fields.take(record)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tools = _take_list(record, "tools") if record.get("tools") else None
    return Conversation(line=line, messages=_add_system(messages, system), tools=tools)


def _take_list(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = record[key]
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise BadRow("wrong type", f"{key!r} must be a list of objects, and not empty")
    return value


def _rename(message: Mapping[str, Any]) -> Message:
    """{from, value} as {role, content}, what else there is kept; {role, content} as it is."""
    if "role" in message:
        return dict(message)
    speaker = message.get("from")
    if speaker not in _SHAREGPT_ROLES:
        raise BadRow("unknown speaker", f"'from' is {speaker!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**others, "role": _SHAREGPT_ROLES[speaker], "content": message.get("value")}


def _check_message(message: Mapping[str, Any]) -> Message:
    """Content may be missing beside tool calls alone."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRow("wrong type", f"'role' is {type(role).__name__}, not a string")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow("wrong type", f"the {role}'s 'content' is {type(content).__name__}, not a string")
    for text in list_texts(message):
        check_text(text)
    if message.get("weight") not in (None, 0, 1):
        raise BadRow("wrong weight", f"'weight' of a message is {message['weight']!r}, neither 0 nor 1")
    return {**message, "role": role, "content": content.strip()}


def is_learnt(message: Message) -> bool:
    """Whether it is an answer; OpenAI's `weight` 0 leaves one out."""
    return bool(message["role"] == "assistant" and message.get("weight") != 0)


def list_texts(value: Any) -> list[str]:
    """Every string in a message or a tool, keys and all that is nested included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [text for one in value for text in list_texts(one)] if isinstance(value, list) else []


def _add_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
