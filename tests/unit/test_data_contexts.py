"""Contexts out of every kind of file, to tokens and back."""

import json

import pytest
from data_files import tiny_tokenizer

from lora_dist.data.contexts import Context, decode_texts, encode_contexts, read_contexts
from lora_dist.data.examples import encode_pairs
from lora_dist.data.rows import BadRows, Fields, Pair
from lora_dist.generation_config import GenerateOptions

FILES = {
    "a.txt": ("name : A||It is A.\nname : B||It is B.\n", "e2e_text"),
    "b.txt": ("name : A\nname : B\n", "text"),
    "c.csv": ("mr,ref\nname[A],It is A.\nname[B],It is B.\n", "e2e_csv"),
    "D.JSONL": ('{"context": "name : A", "target": "It"}\n{"context": "name : B"}\n', "jsonl"),
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
        (b"\xff", "text", "x:1: broken UTF-8; correct the row"),
        (b"a||b\nc", "e2e_text", "x:2: no separator"),
        (b"{", "jsonl", "x:1: broken JSON"),
        (b'{"target": "t"}', "jsonl", r"x:1: missing key \('context'\); correct the row$"),
        (b"[1]", "jsonl", r"x:1: wrong type \(a JSON object is expected, not int"),
        (b'{"context": "c", "adapter": 1}', "jsonl", r"x:1: wrong type \('adapter' is 1"),
        (b'[{"dialogue": "d"}]', "samsum", r"x:1: missing key \(entry 1: 'summary'\); correct the row$"),
    ],
)
def test_bad_rows_are_named(content: bytes, file_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_contexts(content, file_format, "x")


DART = [{"tripleset": [["A", "is", "B"]], "annotations": [{"text": "A is B."}]}]


@pytest.mark.parametrize(
    ("file_format", "content", "expected"),
    [
        ("dart", json.dumps(DART), "A : is : B"),
        ("samsum", '[{"dialogue": "Ann: hi\\r\\nBen: ho", "summary": "s"}]', "Ann: hi\nBen: ho"),
        ("glue_rte", "sentence1\tsentence2\tlabel\nx\ty\tentailment\n", "sentence1 : x | sentence2 : y"),
        ("glue_cola", "index\tsentence\r\n0\tx\r\n", "sentence : x"),
        ("glue_cola", "gj04\t1\t\tx\n", "sentence : x"),
        ("glue_mrpc", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tx\ty\n", "sentence1 : x | sentence2 : y"),
        ("glue_stsb", "index\tsentence1\tsentence2\n0\tx\ty\n", "sentence1 : x | sentence2 : y"),
        ("banking77", "text,category\nx,y\n", "x"),
        ("clinc150", '{"train": [["a", "b"]], "test": [["x", "y"]]}', "x"),
    ],
)
def test_every_format_of_training_without_its_targets(file_format: str, content: str, expected: str) -> None:
    split = "test" if file_format == "clinc150" else None
    assert read_contexts(content.encode(), file_format, "f", split=split) == [Context(expected)]


def test_the_keys_of_training() -> None:
    content = b'{"instruction": "Add.", "input": "1, 2", "output": "3", "context": "no"}'
    fields = Fields(context=("instruction", "input"))
    assert read_contexts(content, "jsonl", "f", fields=fields) == [Context("Add.\n\n1, 2")]


@pytest.mark.parametrize(("name", "formats"), [("x.JSON", "jsonl or chat"), ("x.tsv", "one of glue_cola")])
def test_a_name_that_may_be_of_several_formats(name: str, formats: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: a .* may be of several formats; set generate.format to {formats}"):
        read_contexts(json.dumps(DART).encode(), "auto", name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "clinc150"},
            "generate.split is not set, .* in format clinc150 .* e.g. generate.split=test",
        ),
        (
            {"format": "dart", "split": "test"},
            "generate.split=test: a file in format dart holds one split; leave",
        ),
        ({"context_fields": ["a"]}, r"generate.context_fields=\['a'\]: .* set generate.format=jsonl"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions(**options)


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
    with pytest.raises(ValueError, match=r"f:2: missing key \('context'\); correct the row$"):
        read_contexts(b'[{"context": "a"},\n{}]', "jsonl", "f")
    chat = [{"messages": [{"role": "user", "content": "a"}]}]
    assert read_contexts(json.dumps(chat).encode(), "chat", "f") == read_contexts(
        json.dumps(chat[0]).encode(), "chat", "f"
    )
