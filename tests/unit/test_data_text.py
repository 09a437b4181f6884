"""Running text: every token of a document is learnt once, its first one aside, however it is cut."""

from pathlib import Path

import pytest
from data_files import build_config, tiny_tokenizer
from tokenizer_files import write_llama_tokenizer

from lora_dist.config import DataConfig
from lora_dist.data.rows import BadRows
from lora_dist.data.running_text import Document, encode_documents, read_documents
from lora_dist.data.splits import choose_encoder, load_split
from lora_dist.data.tokenizer import load_tokenizer

LONG = "The Vaults is a pub near The Mill " * 3


@pytest.mark.parametrize("seq_len", [2, 5, 24, 200])
def test_documents_are_cut_into_rows(seq_len: int) -> None:
    tokenizer = tiny_tokenizer()
    examples = encode_documents([Document(1, LONG), Document(2, "Q")], tokenizer, seq_len=seq_len)
    whole = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in (LONG, "Q")]
    bounds = list(zip(examples.starts, examples.starts[1:], strict=False))
    assert all(1 <= behind - first - 1 <= seq_len for first, behind in bounds)
    learnt = examples.tokens[examples.is_learnt].tolist()
    assert learnt == [*whole[0][1:], *whole[1][1:]]
    assert all(
        not examples.is_learnt[first] and examples.is_learnt[first + 1 : behind].all() for first, behind in bounds
    )
    for (first, _), (_, behind) in zip(bounds[1:-1], bounds, strict=False):
        assert examples.tokens[first] == examples.tokens[behind - 1]


def test_a_document_begins_with_the_begin_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_llama_tokenizer(tmp_path)), 512, family="llama")
    examples = encode_documents([Document(1, "The Vaults")], tokenizer, seq_len=40)
    assert tokenizer.decode(examples.tokens.tolist()) == "<|begin|>The Vaults<|end|>"
    assert examples.is_learnt.tolist() == [False] + [True] * (len(examples.tokens) - 1)


def test_files() -> None:
    """Rows of JSON by their field; any other file is one document, its white space kept."""
    rows = b'{"text": " a\\n"}\n{"body": "x", "text": "b"}\n'
    assert list(read_documents(rows, BadRows("f.jsonl", "error"))) == [Document(1, " a\n"), Document(2, "b")]
    array = b'[{"body": "x"},\n{"body": "y"}]'
    assert list(read_documents(array, BadRows("f.json", "error"), field="body")) == [Document(1, "x"), Document(2, "y")]
    plain = "\ufeffFirst line\n\n  second\n".encode()
    assert list(read_documents(plain, BadRows("f.txt", "error"))) == [Document(1, "First line\n\n  second\n")]
    assert list(read_documents(b" \n", BadRows("f.txt", "error"))) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", b'{"text": "a"}\n{"text": " "}\n', r"f.jsonl:2: empty text"),
        ("f.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"f.jsonl:2: missing key \('text'\)"),
        ("f.jsonl", b'{"text": "a"}\nplain\n', r"f.jsonl:2: broken JSON"),
        ("f.txt", b"a\xff", r"f.txt:1: broken UTF-8"),
        ("f.txt", b"", r"no row is usable as text \(it is empty\)"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    data = DataConfig(name="d", format="text", train=str(path), seq_len=8)
    with pytest.raises(ValueError, match=message):
        load_split(
            "data.train",
            str(path),
            data=data,
            encode=choose_encoder(build_config(data), tiny_tokenizer()),
            max_examples=None,
        )
