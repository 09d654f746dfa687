"""How a cost grows: curves through made-up points."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.lab.fit import curve, power_law, simplest

LENGTHS = [64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]
positive = st.floats(1e-3, 1e3)


@given(positive, positive)
def test_a_line_is_found_again_and_no_parabola_is_made_of_it(at_0: float, rate: float) -> None:
    found = simplest(LENGTHS, [at_0 + rate * x for x in LENGTHS])
    assert found is not None
    assert found.worst < 0.1
    assert found.name in ("constant", "linear")
    if found.name == "linear":
        assert found.at(1000) == pytest.approx(at_0 + rate * 1000, rel=1e-6)
        assert found.r2 == pytest.approx(1.0)


def test_a_parabola_is_named_where_a_line_is_off() -> None:
    y = [1 + 0.01 * x + 1e-4 * x * x for x in LENGTHS]
    line = curve("linear", LENGTHS, y)
    found = simplest(LENGTHS, y)
    assert line is None or line.worst > 0.1
    assert found is not None
    assert found.name == "quadratic"
    assert found.coefficients == pytest.approx((1, 0.01, 1e-4), rel=1e-4)


def test_what_does_not_grow_is_constant() -> None:
    found = simplest(LENGTHS, [10.0, 10.4, 9.8, 10.1, 9.9, 10.2])
    assert found is not None
    assert found.name == "constant"


def test_noise_is_given_no_name() -> None:
    assert simplest(LENGTHS, [1.0, 9.0, 2.0, 7.0, 1.0, 8.0]) is None


def test_a_cost_that_falls_is_no_curve_of_growth() -> None:
    assert curve("linear", LENGTHS, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) is None


def test_a_curve_is_not_laid_through_as_few_points_as_it_needs() -> None:
    assert curve("linear", [1.0, 2.0], [1.0, 2.0]) is None
    assert curve("quadratic", [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]) is None


@given(st.floats(0.1, 3.0), positive)
def test_the_exponent_of_a_power_law_is_found_without_error(exponent: float, factor: float) -> None:
    law = power_law(LENGTHS, [factor * x**exponent for x in LENGTHS])
    assert law is not None
    assert law.exponent == pytest.approx(exponent)
    assert law.error == pytest.approx(0.0, abs=1e-6)
    assert law.r2 == pytest.approx(1.0)


def test_the_error_of_an_exponent_grows_with_the_scatter() -> None:
    laws = [
        power_law(LENGTHS, [x * (1 + s * (-1) ** i) for i, x in enumerate(LENGTHS)])
        for s in (0.01, 0.2)
    ]
    assert laws[0] is not None
    assert laws[1] is not None
    assert laws[0].error is not None
    assert laws[1].error is not None
    assert laws[0].error < laws[1].error
    assert "±" in str(laws[1])


def test_two_points_have_an_exponent_and_no_error() -> None:
    law = power_law([1.0, 2.0], [1.0, 4.0])
    assert law is not None
    assert law.exponent == pytest.approx(2.0)
    assert law.error is None
    assert power_law([1.0], [1.0]) is None
