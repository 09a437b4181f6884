"""E2E's two ways of writing, and the way from one to the other."""

from pathlib import Path

import pytest

import lora_dist
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows
from lora_dist.tasks.e2e_text import are_tokenized, detokenize, tokenize

SAMPLE = Path(lora_dist.__path__[0]) / "assets" / "e2e_sample" / "test.txt"
WRITINGS = [
    ("It's family-friendly, £20-25.", "It 's family - friendly , £ 20 - 25 ."),
    ("You'll find it; it isn't far!", "You 'll find it ; it is n't far !"),
    ("Is it the area's 5-star pub?", "Is it the area 's 5-star pub ?"),
    ("Near Café Rouge: cheap", "Near Café Rouge : cheap"),
]


@pytest.mark.parametrize(("raw", "tokenized"), WRITINGS)
def test_there_and_back(raw: str, tokenized: str) -> None:
    assert tokenize(raw) == tokenized
    assert tokenize(tokenized) == tokenized
    assert detokenize(tokenized) == raw


@pytest.mark.parametrize(
    ("raw", "tokenized"),
    [
        ('The "Mill" (a pub).. ', 'The " Mill " ( a pub ) ..'),
        ("known as 'The Mill'.", "known as ' The Mill ' ."),
        ("", ""),
        (".", "."),
        ("'s", "'s"),
    ],
)
def test_quotes_brackets_and_dots(raw: str, tokenized: str) -> None:
    """Where spaces stood around quotes is lost, so there is no way back."""
    assert tokenize(raw) == tokenized
    assert tokenize(tokenized) == tokenized


def test_real_references_are_left_as_they_are() -> None:
    """All 477 of the sample; and made raw, all but those with a spaced dash or quote come back the same."""
    pairs = read_pairs(SAMPLE.read_bytes(), "e2e_text", BadRows(str(SAMPLE), "error"))
    texts = [" ".join(pair.target.split()) for pair in pairs]
    assert [text for text in texts if tokenize(text) != text] == []
    plain = [text for text in texts if "'" not in text.split()]
    assert [text for text in plain if tokenize(detokenize(text)) != text] == []


def test_which_way_a_file_is_written() -> None:
    raw, tokenized = [raw for raw, _ in WRITINGS], [tokenized for _, tokenized in WRITINGS]
    assert not are_tokenized(raw)
    assert are_tokenized(tokenized)
    assert are_tokenized([*tokenized, "Raw."])
