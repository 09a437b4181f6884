"""Which tests run by default: every value of every parameter is in one that does."""

from itertools import product

import pytest
from tiers import exhaustive, few_of, pick_covering


def test_every_value_of_a_product_is_picked_in_as_few_cases_as_there_are_values() -> None:
    cases = [dict(zip("abc", values, strict=True)) for values in product(range(3), range(4), range(2))]
    picked = [cases[place] for place in pick_covering(cases)]
    assert len(picked) == 4
    assert {value for case in picked for value in case.items()} == {value for case in cases for value in case.items()}


def test_values_that_come_alone_are_all_picked() -> None:
    assert pick_covering([{"a": value} for value in range(5)]) == set(range(5))
    assert pick_covering([]) == set()


def test_what_is_not_among_the_few_is_marked() -> None:
    first, second, third = few_of([{"tp": 1}, ("x", 2), "y"], {"tp": 1})
    assert first == {"tp": 1}
    assert (second.values, third.values) == (("x", 2), ("y",))
    assert [mark.name for one in (second, third) for mark in one.marks] == ["exhaustive"] * 2
    assert exhaustive(("x", 2)) == [second]
    with pytest.raises(AssertionError):
        few_of(["a"], "b")


PAIRS = [(tens, ones) for tens in "ab" for ones in "cd"]
RAN = []


@pytest.mark.parametrize("ones", "cd")
@pytest.mark.parametrize("tens", "ab")
def test_a_product(tens: str, ones: str) -> None:
    RAN.append((tens, ones))


@pytest.mark.exhaustive
def test_one_of_the_others() -> None:
    RAN.append("exhaustive")


def test_what_ran_before_this_one(request: pytest.FixtureRequest) -> None:
    """In this very run, unless tests were chosen by name."""
    if any("::" in argument for argument in request.config.args):
        pytest.skip("chosen by name")
    if request.config.getoption("exhaustive"):
        assert sorted(RAN[:-1]) == PAIRS
        assert RAN[-1] == "exhaustive"
    else:
        assert len(RAN) == 2
        assert {tens for tens, _ in RAN} == {"a", "b"}
        assert {ones for _, ones in RAN} == {"c", "d"}
