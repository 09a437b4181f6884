"""`lora-dist evaluate` on files: matching of outputs to items, what is refused, and what is printed and written."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lora_dist.cli.compose import compose_as
from lora_dist.cli.main import main
from lora_dist.cli.schema import list_groups
from lora_dist.evaluate_config import EvaluateConfig
from lora_dist.generation_config import GenerateConfig
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item, load_items
from lora_dist.tasks.labels import find_labels
from lora_dist.tasks.paper import ROWS
from lora_dist.tasks.predictions import load_predictions
from lora_dist.tasks.scoring import score

TASKS = list_groups(owner=EvaluateConfig)["task"]
ITEMS = [
    Item(line=2, context="name : A | Type : pub", references=("a",)),
    Item(line=3, context="name : B", references=("b",)),
]
MEANING = '"name[A], eatType[pub]"'
E2E = "mr,ref\n" + '"name[A], eatType[pub]",A is a pub.\n"name[A], eatType[pub]","A, a pub."\nname[B],B is cheap.\n'

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory, where no java is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))

    def write_file(name: str, content: str | bytes) -> str:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write_file


@pytest.mark.parametrize("task", TASKS)
def test_every_task_file_composes(task: str) -> None:
    config = compose_as(EvaluateConfig, [f"task={task}", "task.references=r", "predictions=p"])
    assert config.task.name == task
    assert config.task.references == "r"


@pytest.mark.parametrize("option", list_groups(owner=EvaluateConfig)["generate"])
def test_every_way_to_generate_composes(option: str) -> None:
    config = compose_as(EvaluateConfig, ["task=e2e", "task.references=r", "predictions=p", f"generate={option}"])
    for name, value in asdict(config.generate).items():
        generating = compose_as(GenerateConfig, ["generate.prompt=x", f"generate={option}"]).generate
        assert getattr(generating, name) == value


def test_a_task_brings_the_papers_decoding_and_the_command_line_wins() -> None:
    given = ["task.references=r", "predictions=p"]
    config = compose_as(EvaluateConfig, ["task=e2e", *given]).generate
    assert (config.num_beams, config.length_penalty, config.no_repeat_ngram_size) == (10, 0.9, 4)
    assert compose_as(EvaluateConfig, ["task=dart", *given]).generate.length_penalty == 0.8
    assert compose_as(EvaluateConfig, ["task=e2e", "generate.num_beams=2", *given]).generate.num_beams == 2


def test_the_papers_rows_belong_to_tasks() -> None:
    assert set(ROWS) <= set(TASKS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "one\ntwo\n"),
        ("p.txt", "\ufeffone\r\ntwo"),
        ("p.jsonl", '{"prediction": "one"}\n{"prediction": " two", "id": 3}\n'),
        (
            "p.jsonl",
            '{"context": "name : B", "output": "two"}\n{"context": "name : A | Type : pub", "output": "one"}\n',
        ),
        (
            "p.jsonl",
            '{"context": "name : B", "text": "two"}\n{"context": "name : A | Type : pub", "text": "one"}\n' * 2,
        ),
        ("p.tsv", f"MR\toutput\n{MEANING}\tone\nname[B]\ttwo\n"),
        ("p.tsv", f"output\tmr\ntwo\tname[B]\none\t{MEANING}\n"),
        ("p.tsv", f"MR\toutput\r\r\n{MEANING}\tone\r\r\nname[B]\ttwo\r\n"),
        ("p.csv", f"mr,output\n{MEANING},one\nname[B],two\n"),
        ("p.csv", "id,prediction\n1,one\n2,two\n"),
    ],
)
def test_outputs_are_matched_by_order_or_by_context(write: Write, name: str, content: str) -> None:
    """As lines, JSON lines, TSV with the challenge's columns, CSV; by context in any order, with E2E's own spelling."""
    assert load_predictions(write(name, content), ITEMS, may_be_empty=False) == ["one", "two"]


BAD_FILES = [
    ("p.txt", "one\n", r"^p.txt:1: 1 outputs for 2 items"),
    ("p.txt", "one\ntwo\nthree\n", r"^p.txt:3: 3 outputs for 2 items"),
    ("p.txt", "", r"^p.txt:1: 0 outputs for 2 items"),
    ("p.txt", "one\n \n", r"^p.txt:2: unlabeled row"),
    ("p.txt", b"one\ntw\xff\n", r"^p.txt:2: broken UTF-8"),
    ("p.csv", "mr,text\nname[B],x\n", r"^p.csv:1: no column of outputs, the header is 'mr,text'; call it prediction"),
    ("p.csv", "mr,output,output\nname[B],x,y\n", r"^p.csv:1: several columns are called output; rename all but one"),
    ("p.csv", "mr,output\nname[B],x,y\n", r"^p.csv:2: wrong number of fields \(3 instead of 2\)"),
    ("p.csv", b"mr,output\nname[B],\xe9\n", r"^p.csv:2: broken UTF-8"),
    ("p.csv", 'mr,output\nname[B],"x\n', r"^p.csv:2: broken quoting \(.*\)"),
    ("p.tsv", f"mr\toutput\n{MEANING}\tx\nname[C]\ty\n", r"^p.tsv:3: the references have no context 'name\[C\]'"),
    (
        "p.tsv",
        f"mr\toutput\n{MEANING}\tx\n{MEANING}\ty\n",
        r"^p.tsv:3: a second, other output for 'name\[A\], eatType\[pub\]'",
    ),
    ("p.tsv", f"mr\toutput\n{MEANING}\tx\n", r"^p.tsv:2: 1 of 2 contexts have no output, the first 'name : B'"),
    ("p.tsv", f"mr\toutput\n{MEANING}\t\nname[B]\ty\n", r"^p.tsv:2: unlabeled row"),
    ("p.tsv", f"mr\toutput\r\r\n{MEANING}\tx\r\r\nname[C]\ty\r\r\n", r"^p.tsv:3: the references have no context"),
    ("p.tsv", f"mr\toutput\n\n{MEANING}\tx\n", r"^p.tsv:2: blank line"),
    ("p.jsonl", '{"prediction": "x"}\n{"txt": "y"}\n', r"^p.jsonl:2: missing key \('prediction'\)"),
    ("p.jsonl", '{"prediction": 3}\n', r"^p.jsonl:1: wrong type \('prediction' is int, not a string\)"),
    ("p.jsonl", '{"prediction": "x"}\n{"pre\n', r"^p.jsonl:2: broken JSON"),
    (
        "p.jsonl",
        '{"text": "x"}\n{"context": "name : B", "text": "y"}\n',
        r"^p.jsonl:1: no context, and line 2 has one; give it in all or in none$",
    ),
    ("p.jsonl", '["x"]\n', r"^p.jsonl:1: wrong type \(a JSON object is expected, not list\)"),
    ("p.jsonl", "3\n", r"^p.jsonl:1: wrong type \(a JSON object is expected, not int\)"),
    ("p.jsonl", b'{"prediction": "\xff"}\n', r"^p.jsonl:1: broken UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_outputs_are_named_by_file_and_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_predictions(write(name, content), ITEMS, may_be_empty=False)


def test_short_texts_may_be_empty_and_one_context_may_come_twice(write: Write) -> None:
    assert load_predictions(write("p.txt", "\nx\n"), ITEMS, may_be_empty=True) == ["", "x"]
    twice = [Item(line=line, context="q", references=("r",)) for line in (1, 2)]
    content = "context,prediction\nq,first\nq,second\n"
    assert load_predictions(write("p.csv", content), twice, may_be_empty=False) == ["first", "second"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_contexts_may_have_the_line_ends_of_the_published_file(write: Write, name: str) -> None:
    entry = {"dialogue": "Ann: hi\r\nBen: ho", "summary": "s"}
    references = write("r.json", json.dumps([entry]))
    items = load_items(TaskConfig(name="samsum", format="samsum", metric="rouge", references=references))
    rows = {
        "p.jsonl": json.dumps({"context": entry["dialogue"], "text": "x"}),
        "p.csv": f'context,output\r\n"{entry["dialogue"]}",x\r\n',
    }
    assert load_predictions(write(name, rows[name]), items, may_be_empty=True) == ["x"]


def test_references_are_grouped_by_context_wherever_they_stand(write: Write) -> None:
    write("r.txt", "x||one\ny||two\nx||three\n")
    items = load_items(TaskConfig(name="e2e", format="e2e_text", metric="e2e", references="r.txt"))
    assert [(item.line, item.context, item.references) for item in items] == [
        (1, "x", ("one", "three")),
        (2, "y", ("two",)),
    ]
    labels = TaskConfig(name="banking77", format="banking77", metric="accuracy", references="r.csv")
    write("r.csv", "text,category\nq,a\nq,b\n")
    assert [item.references for item in load_items(labels)] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("metric", "message"),
    [("sql", r"r.jsonl:2: 'b' is no query: task.metric=sql"), ("correlation", r"r.jsonl:2: 'b' is no number")],
)
def test_references_that_a_metric_cannot_read_are_refused(write: Write, metric: str, message: str) -> None:
    readable = {"sql": "SELECT [Name] FROM table", "correlation": "1.5"}[metric]
    rows = [{"context": "q", "target": readable}, {"context": "q", "target": "b"}]
    write("r.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load_items(TaskConfig(name="jsonl", format="jsonl", metric=metric, references="r.jsonl"))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("glue_mnli", ["contradiction", "entailment", "neutral"]),
        ("glue_mrpc", ["different", "equivalent"]),
        ("glue_stsb", []),
        ("banking77", ["a", "b"]),
        ("e2e", []),
    ],
)
def test_labels_are_glues_own_or_those_of_the_references(task: str, expected: list[str]) -> None:
    config = compose_as(EvaluateConfig, [f"task={task}", "task.references=r", "predictions=p"])
    assert find_labels(config.task, ITEMS) == expected


def test_labels_are_given_or_those_of_all_of_clinc150(write: Write) -> None:
    splits = {"train": [["x", "a"], ["y", "b"]], "oos_test": [["q", "oos"]]}
    clinc = {"name": "t", "format": "clinc150", "metric": "accuracy", "references": write("c", json.dumps(splits))}
    task = TaskConfig(**clinc, split="oos_test")
    items = load_items(task)
    assert find_labels(task, items) == ["a", "b", "oos"]
    assert score(task, ["a"], items).notes == []
    assert find_labels(replace(task, labels=["oos", "b"]), items) == ["oos", "b"]
    with pytest.raises(ValueError, match=r"^c:1: label 'oos' is none of task.labels=\['a', 'b'\]; add it$"):
        load_items(replace(task, labels=["a", "b"]))


def test_one_label_alone_is_no_choice(write: Write) -> None:
    references = write("r.csv", "text,category\nq,a\nr,a\n")
    task = TaskConfig(name="banking77", format="banking77", metric="accuracy", references=references)
    with pytest.raises(ValueError, match=r"r.csv: every row is 'a', so there is nothing .* give task.labels=\[a,...\]"):
        find_labels(task, load_items(task))


def test_table_and_record(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("refs.csv", E2E)
    write("out.txt", "A is a pub.\nB is cheap.\n")
    assert main(["evaluate", "task=e2e", "task.references=refs.csv", "predictions=out.txt"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("| e2e, 2 items | BLEU | NIST | NIST (mteval.pl) | METEOR | ROUGE-L | CIDEr |")
    assert lines[2].startswith("| tokenised text (outputs tokenised here) | 100.00 | ")
    assert lines[3].startswith("| raw text | 100.00 | ")
    assert "| paper: GPT-2 M, LoRA 0.35M, tokenised | 70.4±.1 | 8.85±.02 |  | 46.8±.2 | 71.8±.1 | 2.53±.02 |" in lines
    assert "Note: no java on PATH" in printed
    record = json.loads(Path("out.txt.scores.json").read_text(encoding="utf-8"))
    assert (record["task"], record["num_items"], record["predictions"]) == ("e2e", 2, "out.txt")
    assert record["rows"][1]["values"]["BLEU"] == pytest.approx(100)
    assert record["rows"][1]["values"]["METEOR"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predictions=p", "task.references=r"], "You must specify 'task'"),
        (["task=e2f"], "no file conf/task/e2f.yaml; did you mean e2e?"),
        (
            ["task=e2e", "task.references=refs.csv"],
            "0 of predictions, adapter and base_alone are set; give predictions=FILE",
        ),
        (["task=e2e", "predictions=out.txt"], "task.references: not set; give task.references=FILE"),
        (["task=e2e", "task.references=refs.csv", "predictions=no"], "predictions=no is no file"),
        (["task=e2e", "task.references=no", "predictions=out.txt"], "task.references=no is no file"),
        (
            ["task=e2e", "task.references=refs.csv", "predictions=out.txt", "output=no/x"],
            "output=no/x cannot be written",
        ),
        (["task=e2e", "task.references=refs.csv", "predictions=out.txt", "output=."], "output=. cannot be written"),
        (["task=e2e", "task.references=bad.csv", "predictions=out.txt"], "bad.csv:2: empty target; correct the row"),
        (["task=e2e", "task.references=empty.txt", "predictions=out.txt"], "task.references=empty.txt has no rows"),
        (["task=glue_rte", "task.references=rte.tsv", "predictions=out.txt"], "rte.tsv:2: unlabeled row"),
        (["task=e2e", "task.references=refs.csv", "predictions=short.txt"], "short.txt:1: 1 outputs for 2 items"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("refs.csv", E2E)
    write("out.txt", "A is a pub.\nB is cheap.\n")
    write("short.txt", "A is a pub.\n")
    write("bad.csv", "mr,ref\nname[A],\n")
    write("empty.txt", "")
    write("rte.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t\n")
    assert main(["evaluate", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(Path().glob("*.scores.json"))
