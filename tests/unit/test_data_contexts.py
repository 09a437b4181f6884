"""Contexts out of every kind of file, to tokens and back."""

import json

import pytest
from data_files import tiny_tokenizer

from lora_dist.data.contexts import Context, decode_texts, encode_contexts, read_contexts
from lora_dist.data.examples import encode_pairs
from lora_dist.data.readers import BadRows, Pair

FILES = {
    "a.txt": ("name : A||It is A.\nname : B||It is B.\n", "e2e_text"),
    "b.txt": ("name : A\nname : B\n", "text"),
    "c.csv": ("mr,ref\nname[A],It is A.\nname[B],It is B.\n", "e2e_csv"),
    "d.jsonl": ('{"context": "name : A", "target": "It"}\n{"context": "name : B"}\n', "jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_known_by_name_or_content(name: str) -> None:
    text, file_format = FILES[name]
    for given in ("auto", file_format):
        assert read_contexts(text.encode(), given, name) == [Context("name : A"), Context("name : B")]


def test_a_json_row_may_name_its_adapter() -> None:
    rows = b'{"context": "x", "adapter": "runs/a"}\n{"context": "y", "adapter": null}\n'
    assert read_contexts(rows, "auto", "x.jsonl") == [Context("x", "runs/a"), Context("y")]


@pytest.mark.parametrize(
    ("content", "file_format", "message"),
    [
        (b"", "text", "x holds no context"),
        (b"a\n\nb", "text", "x:2: blank line"),
        (b"\xff", "text", "x is not UTF-8"),
        (b"a||b\nc", "e2e_text", "x:2: no separator"),
        (b"{", "jsonl", "x:1: broken JSON"),
        (b'{"target": "t"}', "jsonl", "x:1: a JSON object with the string 'context' is expected"),
        (b"[1]", "jsonl", "x:1: a JSON object with the string 'context' is expected"),
        (b'{"context": "c", "adapter": 1}', "jsonl", "x:1: 'adapter' is 1"),
    ],
)
def test_bad_rows_are_named(content: bytes, file_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_contexts(content, file_format, "x")


def test_a_context_is_encoded_and_a_target_decoded_as_in_training() -> None:
    tokenizer = tiny_tokenizer()
    pair = Pair(1, "name : The Vaults", "The Vaults is n't a pub .")
    example = encode_pairs([pair], tokenizer, seq_len=256, bad=BadRows("x", "error"))
    ((context,), end) = encode_contexts([pair.context], tokenizer, end_context=True)
    tokens = example.tokens.tolist()
    assert tokens[: len(context)] == context
    assert [tokens[-1]] == end
    target = tokens[len(context) : -1]
    assert decode_texts([target], tokenizer, strip=True) == [pair.target]
    assert decode_texts([target], tokenizer, strip=False) == [" " + pair.target]
    assert encode_contexts([pair.context], tokenizer, end_context=False)[0] == [context[:-1]]


def test_an_array_is_read_as_lines_are() -> None:
    rows = [{"context": " a "}, {"context": "b", "adapter": "x"}]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    assert read_contexts(array, "jsonl", "f") == read_contexts(lines, "jsonl", "f") == [Context("a"), Context("b", "x")]
    with pytest.raises(ValueError, match="f:2: a JSON object with the string 'context' is expected"):
        read_contexts(b'[{"context": "a"},\n{}]', "jsonl", "f")
    chat = [{"messages": [{"role": "user", "content": "a"}]}]
    assert read_contexts(json.dumps(chat).encode(), "chat", "f") == read_contexts(
        json.dumps(chat[0]).encode(), "chat", "f"
    )
