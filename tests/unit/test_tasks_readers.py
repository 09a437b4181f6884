"""The readers of task files: what a row becomes, on samples of the real files, and how a bad one is named."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lora_dist.config import FILE_FORMATS
from lora_dist.data import glue, readers, wikisql
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows, Pair
from lora_dist.data_config import FIELD_FORMATS

SAMPLES = Path(__file__).parents[1] / "data" / "tasks"
PLATES = "[State/territory] [Text/background colour] [Format] [Current slogan] [Current series] [Notes]"


def read(content: str | bytes, file_format: str, split: str | None = None, path: str = "f") -> list[Pair]:
    text = content.encode() if isinstance(content, str) else content
    return list(read_pairs(text, file_format, BadRows(path, "error"), split=split))


def read_sample(name: str, file_format: str, split: str | None = None) -> list[Pair]:
    return read((SAMPLES / name).read_bytes(), file_format, split, str(SAMPLES / name))


def test_every_format_of_the_configuration_has_a_reader() -> None:
    assert {*readers._READERS, *FIELD_FORMATS, "clinc150"} == set(FILE_FORMATS)
    assert set(glue.TASKS) == {name.removeprefix("glue_") for name in FILE_FORMATS if name.startswith("glue_")}


def test_samples_are_attributed() -> None:
    source = (SAMPLES / "SOURCE.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in source for path in SAMPLES.iterdir() if path.name != "SOURCE.md")


def test_banking77() -> None:
    """A quoted text may hold line ends; the row after it is named by its own line."""
    pairs = read_sample("banking77.csv", "banking77")
    assert pairs[0] == Pair(2, "How do I locate my card?", "card_arrival")
    assert pairs[1] == Pair(3, "Where can I get my PIN unblocked?", "pin_blocked")
    assert pairs[2].line == 5


def test_clinc150() -> None:
    pairs = read_sample("clinc150.json", "clinc150", "test")
    assert (pairs[0].context, pairs[0].target) == ("how would you say fly in italian", "translate")
    assert {pair.target for pair in read_sample("clinc150.json", "clinc150", "oos_test")} == {"oos"}
    with pytest.raises(ValueError, match=r"no key 'tset'; there are oos_val, val, train"):
        read_sample("clinc150.json", "clinc150", "tset")
    with pytest.raises(ValueError, match=r"holds several splits; name one"):
        read_sample("clinc150.json", "clinc150")
    with pytest.raises(ValueError, match=r"a file in format banking77 holds one split, so there is no 'test' in it"):
        read_sample("banking77.csv", "banking77", "test")


def test_wikisql() -> None:
    """Columns come from the file of tables beside the questions."""
    pairs = read_sample("wikisql.jsonl", "wikisql")
    assert pairs[2] == Pair(
        3,
        f"{PLATES} What is the format for South Australia?",
        "SELECT [Format] FROM table WHERE [State/territory] = 'South Australia'",
        "1-1000181-1",
    )
    assert wikisql.list_columns(pairs[2].context)[1] == "Text/background colour"


def write_question(sql: object, header: Sequence[object] = ("A", "A", "O'B [x]")) -> str:
    return json.dumps({"question": "q", "table_id": "1-2", "table": {"header": list(header)}, "sql": sql})


def test_wikisql_queries_can_be_read_back() -> None:
    """Two columns of one name, brackets and quotes, numbers, all operators, an aggregate."""
    sql = {"sel": 1, "agg": 3, "conds": [[0, 1, 2.5], [2, 0, "it's AND [x] = '3'"], [1, 2, 7]]}
    (pair,) = read(write_question(sql), "wikisql")
    assert wikisql.list_columns(pair.context) == ["A", "A (2)", "O'B [x]"]
    assert pair.target == (
        "SELECT COUNT([A (2)]) FROM table WHERE [A] > '2.5' AND [O'B [x]]] = 'it''s AND [x] = ''3''' AND [A (2)] < '7'"
    )
    query = wikisql.parse_query(pair.target)
    assert query is not None
    assert query.conditions[1] == ("O'B [x]", "=", "it's AND [x] = '3'")
    assert wikisql.write_query(query) == pair.target


def test_wikisql_needs_its_tables() -> None:
    row = '{"question": "q", "table_id": "1-2", "sql": {"sel": 0, "agg": 0, "conds": []}}'
    with pytest.raises(ValueError, match=r"/nowhere/dev.tables.jsonl: the columns of /nowhere/dev.jsonl's tables"):
        read(row, "wikisql", path="/nowhere/dev.jsonl")
    sample = str(SAMPLES / "wikisql.jsonl")
    with pytest.raises(ValueError, match=r"wikisql.jsonl:1: unknown table \('1-2' is not in .*wikisql.tables.jsonl\)"):
        read(row, "wikisql", path=sample)


def write_webnlg(category: str, comment: str = "good") -> dict[str, object]:
    return {
        "category": category,
        "lexicalisations": [{"comment": comment, "lex": "A is b."}, {"comment": "good", "lex": "B is a's."}],
        "modifiedtripleset": [
            {"subject": "A", "property": "isA", "object": "b"},
            {"subject": "B", "property": "of", "object": '"a, c"'},
        ],
    }


def test_webnlg() -> None:
    """A pair a good sentence, the category's part beside it, each with the line where its entry starts."""
    entries = [{"1": write_webnlg("Airport", comment="bad")}, {"2": write_webnlg("Athlete")}]
    text = '{"version": [1, {"entries": []}],\n "entries": [\n' + ",\n".join(map(json.dumps, entries)) + "]}"
    context = 'A : isA : b | B : of : "a, c"'
    assert read(text, "webnlg") == [
        Pair(3, context, "B is a's.", "seen"),
        Pair(4, context, "A is b.", "unseen"),
        Pair(4, context, "B is a's.", "unseen"),
    ]


def test_dart() -> None:
    entry = {"tripleset": [["A", "IS_A", "B"], ["B", "of", "C"]], "annotations": [{"source": "x", "text": " A is B. "}]}
    assert read(json.dumps([entry], indent=1), "dart") == [Pair(2, "A : is_a : B | B : of : C", "A is B.")]


def test_samsum() -> None:
    entry = {"id": "1", "dialogue": "Ann: hi\r\nBen: hello", "summary": "They greet."}
    assert read(json.dumps([entry]), "samsum") == [Pair(1, "Ann: hi\nBen: hello", "They greet.")]


@pytest.mark.parametrize("write", [json.dumps, repr, lambda row: json.dumps(row).replace("{", "{ ")])
def test_dialogsum_in_json_and_as_python_writes_it(write: object) -> None:
    """The test split has three summaries a dialogue."""
    assert callable(write)
    rows = [
        {"fname": "train_0", "dialogue": '#Person1#: It\'s "me" \U0001f600.\n', "summary": "s", "topic": "t"},
        {"fname": "test_0", "dialogue": "d", "summary1": "a", "summary2": "b", "summary3": "c"},
    ]
    pairs = read("\n".join(map(write, rows)), "dialogsum")
    assert pairs[0] == Pair(1, '#Person1#: It\'s "me" \U0001f600.', "s")
    assert [(pair.line, pair.context, pair.target) for pair in pairs[1:]] == [(2, "d", text) for text in "abc"]


GLUE_ROWS = [
    ("cola", "gj04\t0\t*\tThey drank the pub.", "sentence : They drank the pub.", "unacceptable"),
    ("sst2", 'sentence\tlabel\na "fine" film\t1', 'sentence : a "fine" film', "positive"),
    (
        "mrpc",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA said "x\t"x, A said',
        'sentence1 : A said "x | sentence2 : "x, A said',
        "equivalent",
    ),
    (
        "qqp",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0",
        "question1 : Why? | question2 : How?",
        "different",
    ),
    (
        "stsb",
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA.\tB.\t2.500",
        "sentence1 : A. | sentence2 : B.",
        "2.5",
    ),
    (
        "mnli",
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n0\tx\tA.\tB.\tneutral\tentailment",
        "premise : A. | hypothesis : B.",
        "entailment",
    ),
    (
        "qnli",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment",
        "question : Who? | sentence : He.",
        "not_entailment",
    ),
    (
        "rte",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment",
        "sentence1 : A. | sentence2 : B.",
        "entailment",
    ),
    (
        "wnli",
        "index\tsentence1\tsentence2\tlabel\r\n0\tA.\tB.\t0\r",
        "sentence1 : A. | sentence2 : B.",
        "not_entailment",
    ),
]


@pytest.mark.parametrize(("name", "text", "context", "target"), GLUE_ROWS)
def test_glue(name: str, text: str, context: str, target: str) -> None:
    """Quotes are letters in GLUE's files; CoLA's have no header, MNLI's label is the one agreed on."""
    assert read(text + "\n", f"glue_{name}") == [Pair(1 if name == "cola" else 2, context, target)]


QUERY = {"sel": 0, "agg": 0, "conds": []}
BAD = [
    ("banking77", "text,category\nhi,", 2, "empty target", ""),
    ("banking77", "text,category\nhi,a,b", 2, "wrong number of fields", r" \(3 instead of 2\)"),
    ("banking77", 'text,category\nx,y\n"hi', 3, "broken quoting", r" \(.*\)"),
    ("banking77", b"text,category\nhi\xff,a", 2, "broken UTF-8", ""),
    ("glue_sst2", "sentence\tlabel\nfine\t2", 2, "unlabeled row", r" \(label='2' is not one of 0, 1\)"),
    ("glue_sst2", "sentence\tlabel\nfine\t", 2, "unlabeled row", r" \(label='' is not one of 0, 1\)"),
    ("glue_cola", "a\t1\t\tx\na\t1\tx", 2, "wrong number of fields", r" \(3 instead of 4\)"),
    *[
        ("glue_stsb", f"sentence1\tsentence2\tscore\na\tb\t{score}", 2, "unlabeled row", rf" \(score='{score}' is .*\)")
        for score in ("high", "nan", "-inf")
    ],
    (
        "webnlg",
        '{"entries": [\n{"1": {"category": "City"}}]}',
        2,
        "missing key",
        r" \(entry 1: 'modifiedtripleset', .*\)",
    ),
    ("webnlg", '{"entries": [3]}', 1, "wrong type", r" \(entry 1: .*\)"),
    (
        "dart",
        '[{"tripleset": [["a", "b"]], "annotations": []}]',
        1,
        "wrong type",
        r" \(entry 1: a triple is three .*\)",
    ),
    ("dart", '[{"tripleset": [], "annotations": [{"text": "x"}]}]', 1, "empty context", r" \(entry 1\)"),
    ("samsum", '[{"dialogue": "d",\n"summary": ""}]', 1, "empty target", r" \(entry 1\)"),
    ("dialogsum", '{"dialogue": "d"}', 1, "missing key", r" \('summary', or .*\)"),
    ("dialogsum", "{'dialogue': open('x')}", 1, "broken JSON", r" \(Expecting .*; nor is it one of Python's .*\)"),
    ("dialogsum", "{[]: 1}", 1, "broken JSON", r" \(.*\)"),
    ("dialogsum", "['d']", 1, "wrong type", r" \(.*\)"),
    ("wikisql", '{"question": "q"}', 1, "missing key", r" \('table_id'\)"),
    ("wikisql", write_question({**QUERY, "sel": 3}), 1, "broken query", r" \(.* of 3 columns: .*\)"),
    ("wikisql", write_question({**QUERY, "sel": -1}), 1, "broken query", r" \(.*-1 is no index.*\)"),
    ("wikisql", write_question({**QUERY, "conds": [[0, 0]]}), 1, "broken query", r" \(.*\)"),
    ("wikisql", write_question(None), 1, "broken query", r" \(.*\)"),
]


@pytest.mark.parametrize(("file_format", "content", "line", "reason", "detail"), BAD)
def test_bad_row(file_format: str, content: str | bytes, line: int, reason: str, detail: str) -> None:
    """Named by file, line, reason and remedy, or counted."""
    with pytest.raises(ValueError, match=rf"^f:{line}: {reason}{detail}; correct the row or set data.on_bad_row=skip$"):
        read(content, file_format)
    bad = BadRows("f", "skip")
    text = content.encode() if isinstance(content, str) else content
    list(read_pairs(text, file_format, bad))
    assert dict(bad.counts) == {reason: 1}


@pytest.mark.parametrize(
    ("file_format", "content", "message"),
    [
        ("samsum", '[{"dialogue": "d", "summary": "s"},\n{]', r"^f:2: broken JSON \(.*\); correct the file$"),
        ("samsum", '[{"dialogue": "d", "summary": "s"}\n{}]', r"^f:2: broken JSON \(a comma or the array's end .*\)"),
        ("samsum", "", r"^f:1: broken JSON \(the document is not an array\)"),
        ("samsum", '[{"dialogue": "d", "summary": "s"}', r"^f:1: broken JSON \(a comma or the array's end .*\)"),
        ("webnlg", "[]", r"^f:1: broken JSON \(an object with the key 'entries' is expected\)"),
        ("webnlg", '{"a": 1,\n"entries": 3}', r"^f:2: broken JSON \('entries' is not an array\)"),
        ("webnlg", '{"a": 1}', r"^f: no key 'entries'; there are a$"),
        ("banking77", "text,label\n", r"^f:1: no column category; the header is 'text,label'$"),
        ("banking77", "text,text,category\na,b,c\n", r"^f:1: several columns are called text; rename all but one$"),
        ("glue_rte", "", r"^f:1: no column sentence1, sentence2, label; the header is ''$"),
        ("glue_rte", "index\tsentence1\tsentence2\n", r"^f:1: no column label; the header is 'index,sentence1,"),
        ("glue_cola", "index\tsentence\n0\tx\n", r"^f:1: no column label; the header is 'index,sentence'$"),
    ],
)
def test_a_file_of_another_form(file_format: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content, file_format)
