"""Every file format, and every kind of bad row with its file, line, reason and remedy."""

from pathlib import Path

import pytest
from data_files import build_config, tiny_tokenizer

from lora_dist.config import DataConfig
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows, Pair
from lora_dist.data.splits import Split, choose_encoder, load_split

AROMI = Pair(1, "name : Aromi | Type : pub", "Aromi is a pub .")
JSON_ROW = b'{"context": "a", "target": "b"}\n'


def read(content: bytes, file_format: str, on_bad_row: str = "error") -> tuple[list[Pair], dict[str, int]]:
    bad = BadRows("pairs", on_bad_row)
    return list(read_pairs(content, file_format, bad)), dict(bad.counts)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_e2e_text(mark: bytes, end: bytes) -> None:
    content = mark + b"name : Aromi | Type : pub||Aromi is a pub . " + end + "n : Caf\u00e9||A caf\u00e9".encode() + end
    assert read(content, "e2e_text") == ([AROMI, Pair(2, "n : Caf\u00e9", "A caf\u00e9")], {})


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_e2e_csv(mark: bytes, end: bytes) -> None:
    """Quoting, doubled quotes, a line end within a field; a row is named by the line where it starts."""
    rows = [
        b"mr,ref",
        b'"name[Aromi], eatType[pub]",Aromi is a pub .',
        b'"name[A]","say ""A"",' + end + b'twice"',
        b"name[B],B",
    ]
    pairs, _ = read(mark + end.join(rows) + end, "e2e_csv")
    assert pairs[0] == Pair(2, AROMI.context, AROMI.target)
    assert (pairs[1].line, pairs[1].target.replace("\r\n", "\n")) == (3, 'say "A",\ntwice')
    assert pairs[2] == Pair(5, "name : B", "B")


def test_e2e_csv_has_the_contexts_of_e2e_text() -> None:
    """Slot names and price signs as in the text form of the data."""
    meaning = "name[The Mill], priceRange[\u00a320-25], familyFriendly[no], customer rating[5 out of 5]"
    pairs, _ = read(f'"mr","ref"\n"{meaning}","The Mill"\n'.encode(), "e2e_csv")
    expected = "name : The Mill | price : \u00a3 20 - 25 | family friendly : no | customer rating : 5 out of 5"
    assert pairs == [Pair(2, expected, "The Mill")]


def test_jsonl() -> None:
    content = b'{"context": " a ", "target": "b\\n", "id": 3}\r\n{"target": "t", "context": ""}'
    assert read(content, "jsonl") == ([Pair(1, "a", "b"), Pair(2, "", "t")], {})


BAD_ROWS = [
    ("e2e_text", b"no bars here", "no separator", r" \(one '\|\|' is expected\)"),
    ("e2e_text", b"a||b||c", "several separators", r" \(one '\|\|' is expected\)"),
    ("e2e_text", b"a|| ", "empty target", ""),
    ("e2e_text", b" ||b", "empty context", ""),
    ("e2e_text", b"  ", "blank line", ""),
    ("e2e_text", b"a||b\xff", "broken UTF-8", ""),
    ("e2e_csv", b'"name[A]","x" y', "broken quoting", r" \(.*\)"),
    ("e2e_csv", b"name[A]", "wrong number of fields", r" \(1 instead of 2\)"),
    ("e2e_csv", b"name[A],b,c", "wrong number of fields", r" \(3 instead of 2\)"),
    ("e2e_csv", b"", "blank line", ""),
    ("e2e_csv", b"name(A),b", "broken meaning representation", r" \('name\(A\)' is not of the form .*\)"),
    ("e2e_csv", b",b", "empty context", ""),
    ("e2e_csv", b"name[A],", "empty target", ""),
    ("e2e_csv", b"name[A],b\xc3", "broken UTF-8", ""),
    ("jsonl", b'{"context": "a", "target"', "broken JSON", r" \(.*\)"),
    ("jsonl", b'["a", "b"]', "wrong type", r" \(a JSON object is expected, not list\)"),
    ("jsonl", b'{"context": "a"}', "missing key", r" \('target'\)"),
    ("jsonl", b'{"context": "a", "target": 3}', "wrong type", r" \('target' is int, not a string\)"),
    ("jsonl", b'{"context": "a", "target": "\\ud800"}', "broken UTF-8", ""),
    ("jsonl", b'{"context": "a", "target": "\xe9"}', "broken UTF-8", ""),
    ("jsonl", b'{"context": "a", "target": ""}', "empty target", ""),
    ("jsonl", b"", "blank line", ""),
]
FIRST_ROWS = {"e2e_text": b"a||b\n", "e2e_csv": b"mr,ref\n", "jsonl": JSON_ROW}
GOOD_ROWS = {"e2e_text": b"a||b\n", "e2e_csv": b"name[A],b\n", "jsonl": JSON_ROW}


@pytest.mark.parametrize(("file_format", "row", "reason", "detail"), BAD_ROWS)
def test_bad_row(file_format: str, row: bytes, reason: str, detail: str) -> None:
    """The second line is bad: named with the remedy, or counted while the rows around it are kept."""
    content = FIRST_ROWS[file_format] + row + b"\n" + GOOD_ROWS[file_format]
    with pytest.raises(ValueError, match=rf"^pairs:2: {reason}{detail}; correct the row or set data.on_bad_row=skip$"):
        read(content, file_format)
    pairs, counts = read(content, file_format, "skip")
    assert counts == {reason: 1}
    assert pairs[-1].line == 3
    assert len(pairs) == (1 if file_format == "e2e_csv" else 2)


def test_quote_that_never_closes_is_named_by_its_first_line() -> None:
    with pytest.raises(ValueError, match=r"pairs:2: broken quoting \(unexpected end of data, 2 lines long\)"):
        read(b'mr,ref\nname[A],"b\nname[B],c\n', "e2e_csv")


@pytest.mark.parametrize(
    ("end", "reason"),
    [(b"", "broken quoting"), (b'name[C],"c"\n', "broken quoting"), (b'name[C],",c"\n', "wrong number of fields")],
)
def test_lines_that_an_open_quote_takes_in_are_counted(end: bytes, reason: str) -> None:
    content = b'mr,ref\nname[A],"b\n' + b"name[B],c\n" * 3 + end
    num_lines = content.count(b"\n") - 1
    assert read(content, "e2e_csv", "skip") == ([], {reason: 1, f"further lines of {reason}": num_lines - 1})


def test_fields_may_be_long() -> None:
    """Beyond the csv module's own limit, on several lines."""
    long = "word\n" * 60_000
    pairs, _ = read(f'mr,ref\nname[A],"{long}"\nname[B],b\n'.encode(), "e2e_csv")
    assert [(pair.line, len(pair.target)) for pair in pairs] == [(2, len(long) - 1), (60_003, 1)]


@pytest.mark.parametrize("header", [b"MR\nname[A]\n", b"", b"name[A],b\n", b'"mr'])
def test_csv_without_the_columns(header: bytes) -> None:
    with pytest.raises(ValueError, match=r"pairs:1: .*format e2e_csv needs .*'mr,ref'"):
        read(header, "e2e_csv")


def configure(path: Path, content: bytes, **options: object) -> DataConfig:
    path.write_bytes(content)
    return DataConfig(**{"name": "d", "format": "jsonl", "train": str(path), "seq_len": 8, **options})


def load(key: str, data: DataConfig, max_examples: int | None = None) -> Split:
    assert data.train is not None
    encode = choose_encoder(build_config(data), tiny_tokenizer())
    return load_split(key, data.train, data=data, encode=encode, max_examples=max_examples)


def test_row_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "pairs"
    data = configure(path, JSON_ROW + b'{"context": "QWQW", "target": "QWQW"}\n')
    with pytest.raises(ValueError, match=rf"^{path}:2: too long \(10 tokens, data.seq_len=8\); .*on_bad_row=skip"):
        load("data.train", data)
    data.on_bad_row = "skip"
    split = load("data.train", data)
    assert split.file is not None
    assert split.file.skipped_rows == {"too long": 1}
    assert len(split.examples) == split.file.num_examples == 1


def test_first_good_rows(tmp_path: Path) -> None:
    """Bad rows before the last one wanted are counted; what follows is not read."""
    data = configure(tmp_path / "pairs", b"x\n" + JSON_ROW * 3 + b"x\n", on_bad_row="skip")
    split = load("data.train", data, max_examples=2)
    assert split.file is not None
    assert (len(split.examples), split.file.skipped_rows) == (2, {"broken JSON": 1})


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_rows_that_are_too_long_are_made_up_for(most: int, tmp_path: Path) -> None:
    """By rows behind them, and no further than needed: the bad row after the last one wanted is not counted."""
    long = b'{"context": "QWQW", "target": "QWQW"}\n'
    content = long + b'{"context": "a", "target": "b c"}\n' + long * 3 + JSON_ROW + b"x\n" + JSON_ROW
    split = load("data.train", configure(tmp_path / "pairs", content, on_bad_row="skip"), max_examples=most)
    assert split.file is not None
    skipped = [{"too long": 1}, {"too long": 4}, *[{"broken JSON": 1, "too long": 4}] * 2][most - 1]
    assert (len(split.examples), split.file.skipped_rows) == (min(most, 3), skipped)
    whole = load("data.train", configure(tmp_path / "pairs", content, on_bad_row="skip")).examples
    behind = whole.starts[len(split.examples)]
    assert split.examples.tokens.tolist() == whole.tokens[:behind].tolist()
    assert split.examples.starts.tolist() == whole.starts[: len(split.examples) + 1].tolist()
    assert split.examples.is_learnt.tolist() == whole.is_learnt[:behind].tolist()


@pytest.mark.parametrize(("content", "found"), [(b"", "it is empty"), (b"x\n[]\n", "1 x broken JSON, 1 x wrong type")])
def test_no_good_row(tmp_path: Path, content: bytes, found: str) -> None:
    data = configure(tmp_path / "pairs", content, on_bad_row="skip")
    with pytest.raises(ValueError, match=rf"^data.valid=.*/pairs: no row is usable as jsonl \({found}\)"):
        load("data.valid", data)


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), (".", "Is a directory")])
def test_file_that_cannot_be_read(tmp_path: Path, name: str, reason: str) -> None:
    data = DataConfig(name="d", format="jsonl", train=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"^data.valid={tmp_path / name} cannot be read \({reason}\)"):
        load("data.valid", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "fake", "train": "x"},
            "data.format=fake reads no file; set data.train=x and data.valid=None to null",
        ),
        ({"format": "jsonl"}, "data.train is not set; give the path of a file in format jsonl"),
        ({"format": "fake", "max_valid_examples": 0}, "data.max_valid_examples=0 must be at least 1"),
        ({"format": "fake", "num_fake_examples": 0}, "data.num_fake_examples=0 must be at least 1"),
    ],
)
def test_configuration_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(name="d", **options)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("\n[]", r"pairs:2: broken JSON \(the array has ended; one file holds one"),
        (" x", r"pairs:1: broken JSON \(the array has ended"),
        ("", None),
        ("\n \n", None),
    ],
)
def test_an_array_is_the_whole_file(tail: str, message: str | None) -> None:
    content = f"[{JSON_ROW.decode().strip()}]{tail}".encode()
    if message is None:
        assert len(read(content, "jsonl")[0]) == 1
        return
    with pytest.raises(ValueError, match=message):
        read(content, "jsonl")


def test_an_array_does_not_end_with_a_comma() -> None:
    with pytest.raises(ValueError, match=r"pairs:2: broken JSON \(another entry is expected behind the comma"):
        read(b"[" + JSON_ROW.strip() + b",\n]", "jsonl")
