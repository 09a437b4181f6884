"""An encoder's files before it trains: which columns are read, how sentences stay apart, which labels count."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from encoder_toy import build_config, write_rte
from transformers import AutoTokenizer

from lora_dist.data.rows import BadRows
from lora_dist.encoders.examples import encode_examples, find_label_words, load_pairs
from lora_dist.encoders.job import load_data
from lora_dist.task_config import TaskConfig


def test_sentence_pairs_stay_two(tmp_path: Path) -> None:
    config = build_config(tmp_path, "roberta")
    task = TaskConfig(name="rte", format="glue_rte", metric="accuracy", references=str(write_rte(tmp_path / "r.tsv")))
    pairs = load_pairs("task.references", task, None, BadRows(task.references, "error"))
    labels = find_label_words(task, pairs)
    tokenizer = AutoTokenizer.from_pretrained(config.encoder.checkpoint)
    first = encode_examples("task.references", task.references, pairs, task, labels, tokenizer, 16)[0]
    assert tokenizer.decode(first.inputs["input_ids"]) == "<s> the film was good </s> </s> it was good </s>"
    assert (labels.words, first.label) == (("entailment", "not_entailment"), 0.0)


@pytest.mark.parametrize(
    ("task_format", "rows", "expected"),
    [
        (
            "glue_qqp",
            ["question1\tquestion2\tis_duplicate", "the film\tit was good\t1", "the plot\t\t0", "\tgood\t0"],
            ["the film </s> </s> it was good", "the plot </s> </s>", "</s> </s> good"],
        ),
        ("banking77", ["text,category", '"the film\twas bad",a', "it was good,b"], ["the film was bad", "it was good"]),
    ],
)
def test_an_empty_sentence_or_a_tab_changes_no_other_row(
    task_format: str, rows: list[str], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "rows").write_text("\n".join(rows) + "\n")
    task = TaskConfig(name="rows", format=task_format, metric="accuracy", references=str(tmp_path / "rows"))
    pairs = load_pairs("task.references", task, None, BadRows(task.references, "error"))
    tokenizer = AutoTokenizer.from_pretrained(build_config(tmp_path, "roberta").encoder.checkpoint)
    labels = find_label_words(task, pairs)
    examples = encode_examples("task.references", task.references, pairs, task, labels, tokenizer, 16)
    assert [tokenizer.decode(one.inputs["input_ids"]) for one in examples] == [f"<s> {text} </s>" for text in expected]


def test_a_label_that_training_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    for name, intents in (("train.csv", ("a", "b")), ("dev.csv", ("a", "c"))):
        lines = [f"it was good,{intent}" for intent in intents]
        (tmp_path / name).write_text("\n".join(["text,category", *lines]) + "\n")
    task = TaskConfig(name="banking77", format="banking77", metric="accuracy", references=str(tmp_path / "dev.csv"))
    config = build_config(tmp_path, "roberta", task=task, train=str(tmp_path / "train.csv"))
    with pytest.raises(ValueError, match=r"dev.csv:3: label 'c' is none of the 2"):
        load_data(config)


def test_rows_are_read_by_the_tasks_own_keys(tmp_path: Path) -> None:
    """Beside keys that have the usual names and other content."""
    rows = [{"text": f"it was {word}", "label": word, "context": "the plot", "target": "x"} for word in ("good", "bad")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fields = {"context_fields": ["text"], "target_field": "label"}
    task = TaskConfig(name="jsonl", format="jsonl", metric="accuracy", references=str(path), **fields)
    data = load_data(build_config(tmp_path, "roberta", task=task, train=str(path)))
    assert data.labels.words == ("bad", "good")
    for examples in (data.train, data.scored):
        texts = [data.tokenizer.decode(one.inputs["input_ids"]) for one in examples]
        assert texts == ["<s> it was good </s>", "<s> it was bad </s>"]


def test_labels_are_given_where_a_file_has_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,category\nit was good,a\n")
    task = TaskConfig(name="banking77", format="banking77", metric="accuracy", references=str(path))
    config = build_config(tmp_path, "roberta", task=task, train=str(path))
    with pytest.raises(ValueError, match=r"all 1 rows are 'a', so there is nothing .* give task.labels=\[a,...\]"):
        load_data(config)
    given = replace(config, task=replace(task, labels=["b", "a"]))
    data = load_data(given)
    assert (data.labels.words, data.train[0].label) == (("b", "a"), 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"labels": ["a", "b"]}')
    with pytest.raises(ValueError, match=r"task.labels=\['b', 'a'\]: the head's are \['a', 'b'\]; leave task.labels"):
        load_data(replace(given, train=None, adapter=str(tmp_path / "run")))


def test_numbers_are_no_classes_whatever_the_file(tmp_path: Path) -> None:
    rows, text = tmp_path / "rows.jsonl", '{"context": "it was fine", "target": "%s"}\n'
    rows.write_text(text % "2.5" + text % 4 + text % "2.5")
    task = TaskConfig(name="jsonl", format="jsonl", metric="correlation", references=str(rows))
    config = build_config(tmp_path, "roberta", task=task, train=str(rows))
    data = load_data(config)
    assert (data.labels.words, data.labels.num_outputs) == ((), 1)
    assert [example.label for example in data.train] == [2.5, 4.0, 2.5]
    rows.write_text(text % "2.5" + text % "nan")
    with pytest.raises(ValueError, match=r"^train=.*rows.jsonl:2: label 'nan' is no number, .*; correct the row$"):
        load_data(config)


def test_a_file_of_several_splits_needs_one(tmp_path: Path) -> None:
    task = TaskConfig(name="clinc150", format="clinc150", metric="accuracy", references="f", split="test")
    with pytest.raises(
        ValueError, match=r"^train_split is not set, and a file in format clinc150 .* e.g. train_split=train$"
    ):
        build_config(tmp_path, "roberta", task=task)


def test_inputs_that_are_cut_are_counted(tmp_path: Path) -> None:
    """To six tokens, two of them special, of a pair four; what just fits is not cut."""
    config = build_config(tmp_path, "roberta")
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nit was good\t1\nit was a film\t0\nit was a good film\t1\n")
    pairs = TaskConfig(name="rte", format="glue_rte", metric="accuracy", references=str(write_rte(tmp_path / "r.tsv")))
    config.encoder.seq_len = 6
    data = load_data(config)
    assert [len(one.inputs["input_ids"]) for one in data.train] == [5, 6, 6]
    assert [one.is_cut for one in data.train] == [False, False, True]
    assert data.describe()["train"] == {"num_rows": 3, "num_cut": 1, "skipped_rows": {}}
    assert data.list_losses()[0] == "1 of 3 inputs of train are cut to encoder.seq_len tokens"
    config.encoder.seq_len = 11
    assert [one.is_cut for one in load_data(replace(config, task=pairs, train=pairs.references)).train] == [False] * 2
    config.encoder.seq_len = 10
    assert [one.is_cut for one in load_data(replace(config, task=pairs, train=pairs.references)).train] == [True] * 2


def test_bad_rows_of_training_may_be_left_out(tmp_path: Path) -> None:
    rows, task = tmp_path / "rows.csv", tmp_path / "task.csv"
    rows.write_text("text,category\nit was good,a\nit was,\n\nit was bad,b\n")
    task.write_text("text,category\nit was good,a\n")
    scored = TaskConfig(name="banking77", format="banking77", metric="accuracy", references=str(task))
    config = build_config(tmp_path, "roberta", task=scored, train=str(rows))
    with pytest.raises(ValueError, match=r"rows.csv:3: empty target; correct the row or set on_bad_row=skip$"):
        load_data(config)
    data = load_data(replace(config, on_bad_row="skip"))
    assert data.describe()["train"] == {
        "num_rows": 2,
        "num_cut": 0,
        "skipped_rows": {"blank line": 1, "empty target": 1},
    }
    assert data.list_losses() == ["bad rows of train left out: 1 x blank line, 1 x empty target"]
    with pytest.raises(ValueError, match="on_bad_row=skip is of `train`, which is not set; leave it out"):
        replace(config, on_bad_row="skip", train=None)
    rows.write_text("text,category\nit was,\n")
    with pytest.raises(ValueError, match=r"no row is usable as banking77 \(1 x empty target\); give a file that has"):
        load_data(replace(config, on_bad_row="skip"))
    task.write_text("text,category\nit was,\n")
    with pytest.raises(ValueError, match=r"task.csv:2: empty target; correct the row$"):
        load_data(replace(config, on_bad_row="skip"))
