"""Rows of conversations in every form in circulation, and every one that is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_files import chat_directory
from data_files import build_config
from test_data_chat import AGAIN, ANSWERED, ASKED, CHATML, SYSTEM, THOUGHT, build_model, load

from lora_dist.config import DataConfig
from lora_dist.data.conversations import parse_question, read_conversations, write_question
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRow, BadRows, Fields
from lora_dist.data.splits import choose_encoder, load_split
from lora_dist.data.tokenizer import load_model_tokenizer


def test_rows() -> None:
    """OpenAI's form, ShareGPT's, and plain questions, as JSON lines and as one array."""
    rows = [
        {"messages": [SYSTEM, ASKED, ANSWERED], "id": 1},
        {
            "conversations": [
                {"from": "human", "value": " What is The Mill? "},
                {"from": "gpt", "value": "It is a pub."},
            ]
        },
        {"question": "What is", "more": "", "answer": "A pub."},
        {"question": "What is", "more": "The Mill?", "answer": "A pub."},
    ]
    fields = Fields(context=("question", "more"), target="answer")
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    read = list(read_conversations(lines, BadRows("f", "error"), fields=fields, system="Be brief."))
    assert [one.line for one in read] == [1, 2, 3, 4]
    assert list(read[0].messages) == [SYSTEM, ASKED, ANSWERED]
    assert list(read[1].messages) == [SYSTEM, ASKED, ANSWERED]
    assert [one.messages[1]["content"] for one in read[2:]] == ["What is", "What is\n\nThe Mill?"]
    array = list(
        read_conversations(json.dumps(rows, indent=1), BadRows("f", "error"), fields=fields, system="Be brief.")
    )
    assert [one.messages for one in array] == [one.messages for one in read]
    assert [one.line for one in array] == sorted({one.line for one in array})


def test_tools_reach_the_template() -> None:
    calls = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": {"x": 1}}}],
    }
    schema = {"type": "function", "function": {"name": "look"}}
    row = json.dumps({"messages": [ASKED, calls], "tools": [schema]})
    (one,) = read_conversations(row, BadRows("f", "error"))
    source = "{{ tools | tojson }}" + CHATML.replace(
        "{{ message['content'] +",
        "{{ message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
        1,
    )
    template = load(source)
    (part,) = template.split(one, learn_turns="all")
    begin, end = part.answers[0]
    assert '"name": "look"' in part.text[:begin]
    assert part.text[begin:end] == json.dumps(calls["tool_calls"]) + "<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"wrong type \('messages' must be a list of objects, and not empty\)"),
        ({"messages": "x"}, "wrong type"),
        ({"messages": [{"role": "user"}]}, r"wrong type \(the user's 'content' is NoneType, not a string\)"),
        ({"messages": [{"content": "x"}]}, r"wrong type \('role' is NoneType, not a string\)"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "broken UTF-8"),
        (
            {"messages": [{**ANSWERED, "weight": 0.5}]},
            r"wrong weight \('weight' of a message is 0.5, neither 0 nor 1\)",
        ),
        ({"conversations": [{"from": "cat", "value": "x"}]}, r"unknown speaker \('from' is 'cat', not one of human"),
        ({"text": "x"}, r"missing key \('context'\)"),
        ([1], r"wrong type \(a JSON object is expected, not list\)"),
    ],
)
def test_bad_row(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^f:2: {message}"):
        list(read_conversations(f'{{"messages": [{json.dumps(ASKED)}]}}\n{json.dumps(row)}\n', BadRows("f", "error")))


def test_a_conversation_as_a_question() -> None:
    """What `task.format=chat` asks: all before the last answer, equal for equal conversations."""
    content = json.dumps({"messages": [SYSTEM, ASKED, ANSWERED, AGAIN, THOUGHT]}).encode()
    (pair,) = read_pairs(content, "chat", BadRows("f", "error"))
    assert pair.target == THOUGHT["content"]
    assert list(parse_question(pair.context).messages) == [SYSTEM, ASKED, ANSWERED, AGAIN]
    assert parse_question(content.decode()) == parse_question(pair.context)  # its answer is left out
    with pytest.raises(BadRow):
        parse_question(write_question([ANSWERED]))
    assert pair.context == write_question([dict(reversed(one.items())) for one in (SYSTEM, ASKED, ANSWERED, AGAIN)])
    with pytest.raises(ValueError, match=r"f:1: no answer \(the last message must be the assistant's"):
        list(read_pairs(json.dumps({"messages": [ASKED]}).encode(), "chat", BadRows("f", "error")))
    with pytest.raises(BadRow):
        parse_question("[")


def test_conversations_that_are_too_long_are_made_up_for(tmp_path: Path) -> None:
    """As many rows are learnt as are asked for, where the file has them; what is behind them is not read."""
    long = {**ASKED, "content": "What is it? " * 40}
    rows = [json.dumps({"messages": [question, ANSWERED]}) for question in (long, ASKED, long, AGAIN)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, "x"]))
    data = DataConfig(name="d", format="chat", train=str(path), seq_len=100, on_bad_row="skip")
    config = replace(build_config(data), model=build_model(chat_directory()))
    encode = choose_encoder(config, load_model_tokenizer(config.model))
    split = load_split("data.train", str(path), data=data, encode=encode, max_examples=2)
    assert split.file is not None
    assert (len(split.examples), split.file.skipped_rows) == (2, {"too long": 2})
