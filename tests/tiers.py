"""Which tests run unless all are asked for: of a product of parameters every value once, and none marked exhaustive."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pytest


def exhaustive(*cases: object) -> list[object]:
    """Values of a parameter, or tuples of several's, that run with `--exhaustive` alone."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive) for case in cases
    ]


def few_of(cases: Iterable[object], *few: object) -> list[object]:
    """All of them as values of a parameter, of which `few` always run."""
    given = list(cases)
    assert all(case in given for case in few)
    return [case if case in few else exhaustive(case)[0] for case in given]


def list_left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What a run without `--exhaustive` leaves out; never what needs a GPU, whose machines are there for that."""
    products, left_out = defaultdict(list), []
    for item in items:
        if item.get_closest_marker("gpu"):
            continue
        if item.get_closest_marker("exhaustive"):
            left_out.append(item)
        elif isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            products[item.nodeid.split("[")[0]].append(item)
    for product in products.values():
        cases = [{name: id(value) for name, value in item.callspec.params.items()} for item in product]
        picked = pick_covering(cases)
        left_out += [item for place, item in enumerate(product) if place not in picked]
    return left_out


def pick_covering(cases: Sequence[Mapping[str, int]]) -> set[int]:
    """Places of few cases in which every value of every parameter occurs; next is always the one with the most new."""
    missing = {value for case in cases for value in case.items()}
    picked = set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(missing & cases[place].items()))
        picked.add(best)
        missing -= cases[best].items()
    return picked
