"""Metrics of generated text against their definitions, and against the E2E challenge's own scripts."""

import json
import os
import sys
from math import exp, log, log2
from pathlib import Path

import pytest

from lora_dist.task_config import TaskConfig
from lora_dist.tasks.e2e_text import tokenize
from lora_dist.tasks.items import Item, load_items
from lora_dist.tasks.java import compute_meteor, tokenize_as_treebank
from lora_dist.tasks.needs import find_java
from lora_dist.tasks.nist import compute_nist
from lora_dist.tasks.nlg_metrics import NIST_PERL, NO_METEOR, compute_bleu, compute_ter, score_challenge
from lora_dist.tasks.predictions import load_predictions
from lora_dist.tasks.scoring import score

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = json.loads((GOLDEN / "e2e_small.json").read_text(encoding="utf-8"))
OFFICIAL_NAMES = {"BLEU": "BLEU", "NIST": "NIST", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}
IN_HUNDREDTHS = ("BLEU", "METEOR", "ROUGE-L")
E2E_DATA = os.environ.get("LORA_DIST_E2E_DATA")
SYSTEMS = ["adapt", "chen", "dangnt", "forge1", "harv", "sheff2", "slug", "tgen", "tr1", "zhaw1"]
needs_java = pytest.mark.skipif(find_java() is None, reason="METEOR and the Penn Treebank tokenizer need java on PATH")


def check_official(values: dict[str, float | None], official: dict[str, float]) -> None:
    """To 1e-9 where the official script gives all digits; its perl half prints four."""
    for metric, name in OFFICIAL_NAMES.items():
        unit = 100 if metric in IN_HUNDREDTHS else 1
        assert values[metric] == pytest.approx(unit * official[name], rel=1e-9), metric
    assert values[NIST_PERL] == pytest.approx(official["NIST, perl"], abs=5.1e-5)
    assert values["BLEU"] == pytest.approx(100 * official["BLEU, perl"], abs=5.1e-3)


def test_nist_by_hand() -> None:
    """Unigrams a (2 of the references' 5 tokens) and b (1), bigram `a b` (1 of 2 after a); lengths 2 and 2.5."""
    nist = compute_nist([["a", "b"]], [[["a", "b"], ["a", "c", "d"]]])
    penalty = exp(log(0.5) / log(1.5) ** 2 * log(2 / 2.5) ** 2)
    expected = ((log2(5 / 2) + log2(5 / 1)) / 2 + log2(2 / 1) / 1) * penalty
    assert nist.by_item == pytest.approx(expected, rel=1e-12)
    assert nist.by_corpus == pytest.approx(expected, rel=1e-12)


def test_nist_counts_a_repeated_word_as_often_as_one_reference_has_it() -> None:
    nist = compute_nist([["a", "a", "a"]], [[["a", "a"], ["b", "a"]]])
    assert nist.by_item == pytest.approx(2 * log2(4 / 3) / 3 + log2(3 / 1) / 2, rel=1e-12)


def test_nist_lengths_differ_where_items_have_different_numbers_of_references() -> None:
    """Mean lengths 4 and 1 make 5 an item-wise sum; ten tokens over (3 references / 2 items) make 6.67."""
    nist = compute_nist([["a"], ["b"]], [[["a"] * 4], [["b"], ["b"]]])
    beta = log(0.5) / log(1.5) ** 2
    assert nist.by_item / nist.by_corpus == pytest.approx(exp(beta * (log(2 / 5) ** 2 - log(2 / 4) ** 2)), rel=1e-12)


@pytest.mark.parametrize("outputs", [["", ""], ["x", "y"]])
def test_nothing_right_is_zero(outputs: list[str]) -> None:
    references = [["a b", "c d"], ["e f"]]
    assert (
        compute_nist([text.split() for text in outputs], [[r.split() for r in item] for item in references]).by_item
        == 0
    )
    assert compute_bleu(outputs, references) == 0


def test_bleu_by_hand() -> None:
    """`a b c d e` against `a b c d f` and a shorter one: 4/5, 3/4, 2/3, 1/2, and no penalty at equal length."""
    bleu = compute_bleu(["A b c d e"], [["a b c d f", "a"]])
    assert bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-9)


def test_ter_by_hand() -> None:
    """One substitution in four words, the second reference being further away; and a moved word is one edit."""
    assert compute_ter(["a b c d"], [["a b x d", "y"]]) == pytest.approx(1 / 4)
    assert compute_ter(["d a b c", "a"], [["a b c d"], ["a"]]) == pytest.approx((1 / 4 + 0) / 2)


@needs_java
def test_small_outputs_have_the_scores_of_the_official_scripts() -> None:
    check_official(score_challenge(SMALL["outputs"], SMALL["references"]), SMALL["scores"])


def test_without_java_the_table_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """METEOR is left out; BLEU and NIST stay the official ones."""
    monkeypatch.setenv("PATH", str(tmp_path))
    task, predictions = write_small(tmp_path)
    items = load_items(task)
    scores = score(task, load_predictions(str(predictions), items, may_be_empty=True), items)
    raw = scores.rows[1].values
    assert raw["METEOR"] is None
    assert raw["BLEU"] == pytest.approx(100 * SMALL["scores"]["BLEU"], rel=1e-9)
    assert raw["NIST"] == pytest.approx(SMALL["scores"]["NIST"], rel=1e-9)
    assert any("no java on PATH" in note for note in scores.notes)


@needs_java
@pytest.mark.exhaustive
def test_without_java_plain_words_score_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where both tokenizers agree, ROUGE-L and CIDEr are the official ones: punctuation is dropped, case ignored."""
    outputs, references = ["Aromi is a pub, cheap.", "The Mill"], [["Aromi is a cheap pub.", "a pub"], ["the mill!"]]
    with_java = score_challenge(outputs, references)
    monkeypatch.setenv("PATH", str(tmp_path))
    without = score_challenge(outputs, references)
    assert {**with_java, "METEOR": None} == without


def write_small(directory: Path) -> tuple[TaskConfig, Path]:
    """The small outputs and references as files: published CSV and lines."""
    rows = [f'"name[{index}]","{text}"' for index, item in enumerate(SMALL["references"]) for text in item]
    references = directory / "references.csv"
    references.write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    predictions = directory / "outputs.txt"
    predictions.write_text("\n".join(SMALL["outputs"]) + "\n", encoding="utf-8")
    return TaskConfig(name="e2e", format="e2e_text", metric="e2e", references=str(references)), predictions


def test_rows_are_labelled_and_are_of_the_text_they_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outputs count the same on the tokenised scale however they are written, and the labels tell what was done."""
    monkeypatch.setenv("PATH", str(tmp_path))
    task, predictions = write_small(tmp_path)
    items = load_items(task)
    outputs = load_predictions(str(predictions), items, may_be_empty=True)
    scores = score(task, outputs, items)
    assert [row.label for row in scores.rows] == ["tokenised text (outputs tokenised here)", "raw text"]
    assert scores.rows[0].values["BLEU"] != scores.rows[1].values["BLEU"]
    tokenized = score(task, [tokenize(text) for text in outputs], items)
    assert [row.label for row in tokenized.rows] == ["tokenised text", "raw text (outputs detokenised here)"]
    assert tokenized.rows[0].values == scores.rows[0].values


def test_tokenised_references_have_no_score_on_raw_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    references = tmp_path / "test.txt"
    references.write_text("name : A||A is a pub .\nname : A||A , a pub\nname : B||B is n't .\n", encoding="utf-8")
    task = TaskConfig(name="e2e", format="e2e_text", metric="e2e", references=str(references))
    scores = score(task, ["A is a pub .", "B is n't ."], load_items(task))
    assert [row.label for row in scores.rows] == ["tokenised text"]
    assert scores.rows[0].values["BLEU"] == pytest.approx(100)
    assert any("no score on raw text" in note for note in scores.notes)


def test_webnlg_and_dart_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Case and the spaces around punctuation do not count; seen and unseen categories also stand alone; six references
    are used, so that the seventh, which is the output, helps nothing.
    """
    monkeypatch.setenv("PATH", str(tmp_path))
    items = [
        Item(line=1, context="a", references=("The A-B is in C, D.",), part="seen"),
        Item(line=2, context="b", references=(*["w x y z"] * 6, "p q r s"), part="unseen"),
    ]
    task = TaskConfig(name="webnlg", format="webnlg", metric="webnlg", references="unused")
    scores = score(task, ["the a - b is in c ,d .", "p q r s"], items)
    (row,) = scores.rows
    assert list(row.values) == ["BLEU unseen", "BLEU seen", "BLEU", "METEOR", "TER"]
    assert (row.values["BLEU unseen"], row.values["BLEU seen"]) == (0, pytest.approx(100))
    orders = [10 / 14, 9 / 12, 8 / 10, 7 / 8]  # of 10 + 4 words, 9 + 3 pairs ..., the first output's are right
    assert row.values["BLEU"] == pytest.approx(100 * (orders[0] * orders[1] * orders[2] * orders[3]) ** 0.25)
    assert row.values["TER"] == pytest.approx((0 + 1) / 2)
    assert row.values["METEOR"] is None
    assert scores.notes == [NO_METEOR]
    seen_only = score(task, ["the a - b is in c ,d ."], items[:1])
    assert seen_only.rows[0].values["BLEU unseen"] is None
    assert "no item for BLEU unseen" in seen_only.notes[-1]
    dart = TaskConfig(name="dart", format="dart", metric="dart", references="unused")
    assert list(score(dart, ["p q r s"], items[1:]).rows[0].values) == ["BLEU", "METEOR", "TER"]


@needs_java
@pytest.mark.exhaustive
def test_text_of_any_kind_stays_one_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line ends of Java's, METEOR's separator, no text at all, and letters that the user's locale has not."""
    monkeypatch.setenv("LC_ALL", "C")
    java = find_java()
    assert java is not None
    tokenized = tokenize_as_treebank(java, ["A\u2028b\x85c\rd\n", "", "Caf\u00e9, it's (20)."])
    # As in the official scripts: what they drop is spelt -LRB-, and the tokens are lower-cased by then.
    assert tokenized == ["a b c d", "", "caf\u00e9 it 's -lrb- 20 -rrb-"]
    assert compute_meteor(java, ["a ||| b", "", "caf\u00e9"], [["a b"], ["x"], ["caf\u00e9", "z"]]) > 0.3


def test_a_java_that_does_not_run_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no runtime here >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"java cannot run stanford.*\(no runtime here\); it needs Java 8 or newer"):
        tokenize_as_treebank(str(broken), ["a"])
    with pytest.raises(ValueError, match=r"java cannot run meteor-1.5.jar \(it ended early\)"):
        compute_meteor(str(broken), ["a"], [["a"]])


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"sacrebleu is not installed .*bash launch/install.sh evaluate"):
        compute_bleu(["a"], [["a"]])


@needs_java
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    E2E_DATA is None,
    reason="LORA_DIST_E2E_DATA names no directory with e2e/official/testset_w_refs.csv, e2e/lora_format/test.txt and"
    " e2e_metrics/primary/*.tsv (the E2E challenge's outputs, which may not be shipped): official scores NOT checked",
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_real_systems_have_their_official_scores(system: str) -> None:
    """Ten systems of the E2E challenge on its test set, raw and tokenised (tools/e2e_official_scores.py)."""
    assert E2E_DATA is not None
    data = Path(E2E_DATA)
    official = json.loads((GOLDEN / "e2e_official_scores.json").read_text(encoding="utf-8"))[system]
    outputs = str(data / "e2e_metrics" / "primary" / f"{system}.tsv")
    task = TaskConfig(name="e2e", format="e2e_text", metric="e2e", references=str(data / "e2e/lora_format/test.txt"))
    items = load_items(task)
    (tokenized,) = score(task, load_predictions(outputs, items, may_be_empty=True), items).rows
    check_official(dict(tokenized.values), official["tokenised"])
    raw_items = load_items(
        TaskConfig(name="e2e", format="e2e_csv", metric="e2e", references=str(data / "e2e/official/testset_w_refs.csv"))
    )
    predictions = load_predictions(outputs, raw_items, may_be_empty=True)
    check_official(score_challenge(predictions, [item.references for item in raw_items]), official["raw"])
