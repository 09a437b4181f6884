"""Labels, queries, summaries and exact answers: each metric on outputs whose score can be told by hand."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lora_dist.data.wikisql import Query, write_query
from lora_dist.task_config import TaskConfig
from lora_dist.tasks.items import Item
from lora_dist.tasks.scores import Scores
from lora_dist.tasks.scoring import score


def score_texts(metric: str, outputs: list[str], references: list[list[str]], **options: object) -> Scores:
    task = TaskConfig(name="t", format="jsonl", metric=metric, references="unused", **options)  # type: ignore[arg-type]
    items = [Item(line=1, context=str(index), references=tuple(texts)) for index, texts in enumerate(references)]
    return score(task, outputs, items)


def test_accuracy_counts_what_is_no_label_as_wrong_and_says_so() -> None:
    scores = score_texts("accuracy", ["yes", "no ", "perhaps", "no"], [["yes"], ["no"], ["yes"], ["yes"]])
    assert scores.rows[0].values == {"accuracy": 50.0}
    assert scores.notes == ["1 of 4 outputs are none of the labels and count as wrong, e.g. 'perhaps'"]


def test_a_label_that_no_reference_has_is_one_of_the_tasks() -> None:
    assert score_texts("accuracy", ["yes", "no"], [["yes"], ["yes"]], labels=["yes", "no"]).notes == []


def test_f1_of_the_positive_label() -> None:
    """Two of three found are right, two of four are found: F1 = 2 x 2 / (3 + 4)."""
    wanted = [[label] for label in ["p", "p", "p", "p", "n", "n"]]
    scores = score_texts("accuracy_f1", ["p", "p", "n", "?", "p", "n"], wanted, positive="p")
    assert scores.rows[0].values == {"accuracy": pytest.approx(50.0), "F1": pytest.approx(100 * 4 / 7)}


def test_matthews_by_its_formula() -> None:
    """TP 2, TN 1, FP 1, FN 1: (2 x 1 - 1 x 1) / sqrt(3 x 3 x 2 x 2)."""
    wanted = [[label] for label in ["p", "p", "p", "n", "n"]]
    scores = score_texts("matthews", ["p", "p", "n", "p", "n"], wanted)
    assert scores.rows[0].values == {"Matthews": pytest.approx(100 / 6)}
    assert score_texts("matthews", ["p"] * 5, wanted).rows[0].values == {"Matthews": 0.0}


def test_correlations() -> None:
    """A monotone curve: Spearman 1, Pearson 27 / sqrt(5 x 155)... of x = 0..3 and its cube."""
    scores = score_texts("correlation", ["0", "1", "8", "27"], [["0"], ["1"], ["2"], ["3"]])
    x, y = [0, 1, 2, 3], [0, 1, 8, 27]
    mean_x, mean_y = sum(x) / 4, sum(y) / 4
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    expected = {"Pearson": pytest.approx(100 * covariance / spread**0.5), "Spearman": pytest.approx(100)}
    assert scores.rows[0].values == expected


def test_correlation_without_numbers() -> None:
    scores = score_texts("correlation", ["1", "nan", "x"], [["1"], ["2"], ["3"]])
    assert scores.notes == ["2 of 3 outputs are no number and count as 0"]
    constant = score_texts("correlation", ["1", "1"], [["1"], ["2"]])
    assert constant.rows[0].values == {"Pearson": None, "Spearman": None}
    assert "there is no correlation" in constant.notes[0]


def test_exact_match_takes_any_reference() -> None:
    assert score_texts("exact", ["a ", "c"], [["b", "a"], ["d"]]).rows[0].values == {"exact match": 50.0}


def test_rouge_by_hand() -> None:
    """`the cats sat` of `the cat sat down`: all 3 words of 4, 2 pairs of 3; stemming makes cats a cat."""
    scores = score_texts("rouge", ["the cats sat"], [["the cat sat down"]])
    expected = {"ROUGE-1": 2 * 3 / 7, "ROUGE-2": 2 * 2 / 5, "ROUGE-L": 2 * 3 / 7}
    assert scores.rows[0].values == {metric: pytest.approx(100 * value) for metric, value in expected.items()}


def test_rouge_of_several_references_has_both_readings() -> None:
    mean, best = score_texts("rouge", ["a b", "c"], [["a b", "x y"], ["c", "c"]]).rows
    assert (mean.values["ROUGE-1"], best.values["ROUGE-1"]) == (pytest.approx(75), pytest.approx(100))


COLUMNS = ["Name", "Points", "Name (2)"]


def ask(column: str, aggregate: str = "", *conditions: tuple[str, str, str]) -> str:
    return write_query(Query(column=column, aggregate=aggregate, conditions=conditions))


def score_queries(pairs: list[tuple[str, str]], database: str | None = None) -> Scores:
    context = "".join(f"[{column}] " for column in COLUMNS) + "Who?"
    items = [
        Item(line=index, context=context, references=(wanted,), part="1-23-4")
        for index, (_, wanted) in enumerate(pairs, 1)
    ]
    task = TaskConfig(name="wikisql", format="wikisql", metric="sql", references="unused", database=database)
    return score(task, [given for given, _ in pairs], items)


def test_logical_form_ignores_the_order_of_conditions_and_the_case_of_values() -> None:
    a, b = ("Name", "=", "Ann"), ("Points", ">", "3")
    pairs = [
        (
            ask("Name", "", b, ("Name", "=", "ANN")).lower().replace("name", "Name").replace("points", "Points"),
            ask("Name", "", a, b),
        ),
        (ask("Name", "MAX", a), ask("Name", "MIN", a)),
        (ask("Name", "", a), ask("Name", "", a, b)),
        (ask("Name"), ask("Name (2)")),
        ("SELECT everything", ask("Name")),
        ("SELECT MEDIAN([Name]) FROM table", ask("Name")),
    ]
    scores = score_queries(pairs)
    assert scores.rows[0].values == {"logical form": pytest.approx(100 / 6)}
    assert scores.notes[0] == "2 of 6 outputs are no query and count as wrong"
    assert "task.database=dev.db" in scores.notes[1]


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A table as WikiSQL's databases hold it: lower-cased text, numbered columns."""
    path = tmp_path / "dev.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE table_1_23_4 (col0 text, col1 real, col2 text)")
        rows = [("ann", 3.0, "x"), ("bob", 1200.0, "y"), ("ann", 5.0, "z")]
        connection.executemany("INSERT INTO table_1_23_4 VALUES (?, ?, ?)", rows)
    return str(path)


def test_execution_compares_what_is_fetched(database: str) -> None:
    pairs = [
        (ask("Points", "", ("Name", "=", "Ann")), ask("Points", "", ("Name", "=", "ann"))),
        (ask("Name", "", ("Points", ">", "1,000")), ask("Name", "", ("Points", "=", "1200 points"))),
        (ask("Points", "COUNT", ("Name", "=", "ANN")), ask("Name", "COUNT", ("Name", "=", "Ann"))),
        (ask("Name", "", ("Points", "<", "4")), ask("Name", "", ("Points", ">", "4"))),
        (ask("Nobody"), ask("Name")),
        (ask("Name", "", ("Points", "=", "few")), ask("Name")),
        ("drop table table_1_23_4", ask("Name")),
    ]
    values = score_queries(pairs, database).rows[0].values
    assert values == {"logical form": pytest.approx(100 / 7), "execution": pytest.approx(100 * 3 / 7)}


def test_a_wrong_database_is_named(database: str, tmp_path: Path) -> None:
    pairs = [(ask("Name"), ask("Name"))]
    with pytest.raises(ValueError, match=r"task.database=.*/no.db is no file"):
        score_queries(pairs, str(tmp_path / "no.db"))
    assert not (tmp_path / "no.db").exists()
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DROP TABLE table_1_23_4")
    with pytest.raises(ValueError, match=r"the reference of line 1 does not run \(no table table_1_23_4\)"):
        score_queries(pairs, database)
    Path(database).write_bytes(b"not a database at all" * 100)
    with pytest.raises(ValueError, match=r"the reference of line 1 does not run \(file is not a database\)"):
        score_queries(pairs, database)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "bleu"}, "task.metric='bleu' is not one of e2e, webnlg"),
        (
            {"format": "clinc150"},
            "task.split is not set, and a file in format clinc150 .* e.g. task.split=test",
        ),
        ({"format": "xml"}, "task.format='xml' is not one of jsonl, chat, e2e_text"),
        ({"metric": "accuracy_f1"}, "task.positive=None is the label that F1 is of"),
        ({"positive": "yes"}, "task.positive=yes is the label that F1 is of"),
        ({"labels": ["a", "b"]}, "task.metric=exact has none, only accuracy, accuracy_f1, matthews; leave it out"),
        ({"metric": "accuracy", "labels": ["a", "a"]}, "must be at least two, each once"),
        ({"metric": "accuracy_f1", "positive": "c", "labels": ["a", "b"]}, "task.positive=c is none of task.labels="),
    ],
)
def test_configuration_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "t", "format": "jsonl", "metric": "exact", "references": "f", **options})
