"""Shares and their intervals, numbers as reports write them, and that the lab has no others."""

import ast
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.lab.phrasing import number, percent
from tools.lab.questions import EXPECTATIONS, QUESTIONS
from tools.lab.shares import FEWEST, Share, basis, goodput, shorter
from tools.lab.study import STUDIES, Picture

LAB = Path(__file__).resolve().parents[2] / "tools" / "lab"
COUNTS = st.integers(1, 500).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


@pytest.mark.parametrize(
    ("good", "of", "low", "high"),
    [  # Wilson's interval without a correction for continuity, as R's prop.test(correct=FALSE) has it
        (0, 3, 0.0, 0.5615),
        (3, 3, 0.4385, 1.0),
        (3, 4, 0.3006, 0.9544),
        (15, 50, 0.1910, 0.4375),
        (500, 1000, 0.4691, 0.5309),
    ],
)
def test_intervals_are_wilsons(good: int, of: int, low: float, high: float) -> None:
    assert Share(good, of).interval == pytest.approx((low, high), abs=5e-4)


@given(COUNTS)
def test_an_interval_holds_its_share_and_is_turned_over_with_it(count: tuple[int, int]) -> None:
    good, of = count
    low, high = Share(good, of).interval
    assert 0 <= low <= good / of <= high <= 1
    other_low, other_high = Share(of - good, of).interval
    assert (1 - other_high, 1 - other_low) == pytest.approx((low, high))


@given(COUNTS)
def test_more_requests_with_the_same_share_say_more(count: tuple[int, int]) -> None:
    few, many = Share(*count), Share(10 * count[0], 10 * count[1])
    assert many.interval[1] - many.interval[0] < few.interval[1] - few.interval[0]


def test_of_no_requests_nothing_is_known() -> None:
    assert Share(0, 0).interval == (0.0, 1.0)
    with pytest.raises(ValueError, match="0 to 3, got 4"):
        Share(4, 3)


def test_shares_are_apart_if_their_intervals_are() -> None:
    assert not Share(3, 4).apart(Share(1, 4))  # 75% against 25% of four requests says nothing
    assert Share(75, 100).apart(Share(25, 100))
    assert Share(25, 100).apart(Share(75, 100))


def test_goodput_is_a_share_of_the_offered_rate() -> None:
    assert goodput(Share(15, 20), 2.0) == 1.5
    assert goodput(Share(0, 0), 2.0) == 0.0


def test_what_a_verdict_rests_on_is_said_in_requests_and_windows() -> None:
    assert basis(64, 2, 41.2345) == "64 requests in 2 windows of 41.2 s"
    assert basis(3, 1, 7.0) == "3 requests in 1 window of 7.00 s"
    assert shorter([1.0, 2.0, 3.0], [2.0, 2.0, 9.0]) == Share(1, 3)
    assert FEWEST == 50


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1452.19, "1,450"), (150920.4, "151,000"), (999.6, "1,000"), (99.96, "100"), (9.996, "10.0"),
        (56.78, "56.8"), (2.0, "2.00"), (0.1234, "0.123"), (0.000999, "0.000999"),
        (2.1e-6, "2.10e-06"), (0, "0"), (-1452.19, "-1,450"), (inf, "never"), (nan, "-"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-4, 1e9))
def test_a_number_is_off_by_half_a_unit_of_its_third_digit_at_most(value: float) -> None:
    digits = number(value).replace(",", "").replace(".", "").lstrip("0")
    assert len(digits.rstrip("0")) <= 3
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


def test_shares_are_written_without_needless_zeros() -> None:
    assert [percent(each) for each in (0.05, 0.875, 1.0, 0.97912, 0.0, 2.5, 0.0004, 1e-9)] == [
        "5%", "87.5%", "100%", "97.9%", "0%", "250%", "0.04%", "below 0.01%"
    ]  # fmt: skip


def _precise(tree: ast.AST) -> Iterator[str]:
    """Format specifications that say how many digits."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            spec = ast.unparse(node.format_spec)
            if "." in spec:
                yield f"{ast.unparse(node.value)}: {spec}"


WRITERS = {"phrasing.py", "minute.py"}  # the second: coordinates of a picture
TICKS = {
    "plots.py": 1,
    "disagg_plan.py": 1,
}  # ticks of an axis; rates, which are rounded as numbers


@pytest.mark.parametrize("path", sorted(LAB.glob("*.py")), ids=lambda path: path.name)
def test_one_function_decides_how_many_digits_a_report_has(path: Path) -> None:
    found = list(_precise(ast.parse(path.read_text(encoding="utf-8"))))
    assert path.name in WRITERS or len(found) == TICKS.get(path.name, 0), found


def test_every_logarithmic_axis_says_so_in_its_label() -> None:
    """Scales are set in two functions, which write it into the label."""
    tree = ast.parse((LAB / "plots.py").read_text(encoding="utf-8"))
    setters = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("set_xscale", "set_yscale", "loglog")
    }
    assert setters == {"logarithmic_x", "logarithmic_y"}


def test_a_picture_has_a_caption() -> None:
    with pytest.raises(ValueError, match=r"a\.png needs a caption"):
        Picture("a.png", " ")


def test_every_study_has_a_question_and_says_what_to_expect() -> None:
    assert tuple(QUESTIONS) == tuple(EXPECTATIONS) == STUDIES
    assert all(question.endswith("?") for question in QUESTIONS.values())
    assert all(text.startswith("Expect ") for text in EXPECTATIONS.values())
