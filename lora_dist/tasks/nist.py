"""NIST (Doddington 2002, with the length penalty of mteval-v13a): n-gram matches weighted by their information.

Written from the definition, because nltk's corpus_nist computes something else (7.13 instead of 8.59 for one of the E2E
challenge's systems).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log, log2

MAX_ORDER = 5
_BETA = log(0.5) / log(1.5) ** 2
"""An output of two thirds of the references' length is worth half."""

Tokens = Sequence[str]
_Ngram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Nist:
    """One corpus' score, by the two ways in use to compute the length that its references have on average."""

    by_item: float
    """Mean over an item's references, then the sum over items: `measure_scores.py -p`, which the LoRA authors ran."""
    by_corpus: float
    """All references' tokens over their mean number an item: mteval-v13a.pl, whose scores the E2E challenge lists."""


def compute_nist(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Nist:
    """Score of N outputs against each one's references, any number but none of them."""
    counts = Counter(
        ngram for item in references for reference in item for ngram in _list_ngrams(reference, range(1, MAX_ORDER + 1))
    )
    counts[()] = sum(len(reference) for item in references for reference in item)
    gain = sum(_compute_order_gain(outputs, references, counts, order) for order in range(1, MAX_ORDER + 1))
    length = sum(map(len, outputs))
    num_references = sum(map(len, references))
    mean_length = sum(sum(map(len, item)) / len(item) for item in references)
    return Nist(
        by_item=gain * _compute_length_penalty(length, mean_length),
        by_corpus=gain * _compute_length_penalty(length, counts[()] * len(references) / num_references),
    )


def _compute_order_gain(
    outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]], counts: Counter[_Ngram], order: int
) -> float:
    """Information of all matched n-grams of one order over the number of n-grams put out."""
    information = 0.0
    for output, item in zip(outputs, references, strict=True):
        most = Counter[_Ngram]()
        for reference in item:
            most |= Counter(_list_ngrams(reference, (order,)))
        matched = Counter(_list_ngrams(output, (order,))) & most
        information += sum(number * log2(counts[ngram[:-1]] / counts[ngram]) for ngram, number in matched.items())
    num_ngrams = sum(max(0, len(output) - order + 1) for output in outputs)
    return information / num_ngrams if num_ngrams else 0.0


def _compute_length_penalty(length: int, reference_length: float) -> float:
    ratio = length / reference_length
    if ratio <= 0:
        return 0.0
    return exp(_BETA * log(min(1.0, ratio)) ** 2)


def _list_ngrams(tokens: Tokens, orders: Sequence[int]) -> Iterator[_Ngram]:
    return (tuple(tokens[first : first + order]) for order in orders for first in range(len(tokens) - order + 1))
