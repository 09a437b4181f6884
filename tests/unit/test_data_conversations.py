"""Rows of conversations in every form in circulation, and every one that is refused."""

import json
from typing import Any

import pytest
from test_data_chat import AGAIN, ANSWERED, ASKED, CHATML, SYSTEM, THOUGHT, load

from lora_dist.data.conversations import parse_question, read_conversations, write_question
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRow, BadRows, Fields


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
