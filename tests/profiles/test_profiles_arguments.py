"""What each profile may be made from, and the words of what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from polyak.profiles import Exponential, Power, Uniform


def test_power_is_named_by_relative_std_or_exponent() -> None:
    assert Power() == Power(relative_std=0.10)
    assert Power().exponent == pytest.approx(6.9372039376, abs=5e-11)
    assert Power(exponent=6.9372039376).relative_std == pytest.approx(0.10, abs=1e-11)
    assert Power(exponent=0).growth(3, 11) == Uniform().growth(3, 11)


def test_exponential_is_named_by_one_of_three() -> None:
    assert Exponential(0.9) == Exponential(decay=0.9)
    assert Exponential(half_life=10).growth(0, 30) == pytest.approx(3 * math.log(2), rel=1e-15)
    assert Exponential(mean_age=9).growth(0, 1) == pytest.approx(-math.log(0.9), rel=1e-15)


def test_the_ends_of_the_range_of_a_decay() -> None:
    assert Exponential(0).growth(3, 4) == math.inf
    assert Exponential(0, debias=True).growth(3, 4) == math.inf
    assert Exponential(1).growth(3, 4) == 0.0
    assert Exponential(0).weight(3, 4) == 1.0
    assert Exponential(1).weight(3, 4) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2,), r"Power\(2\) needs a keyword: exponent=2 was probably meant, as a relative_std lies below 0.288675"),
        ((0.1,), r"Power\(0.1\) needs a keyword: relative_std=0.1 was probably meant, a share of the run"),
        ((0.1, 7), r"Power\(0.1, 7\) needs a keyword"),
    ],
)
def test_power_takes_no_bare_number(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Power(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relative_std": 0.1, "exponent": 7}, "relative_std=0.1 and exponent=7 name the same thing twice"),
        (
            {"relative_std": 12**-0.5},
            r"outside \(0, 12\*\*-0.5 = 0.288675\); Uniform\(\) is as wide as can be; an exponent is given as",
        ),
        ({"relative_std": 7}, r"relative_std=7 is outside .* an exponent is given as exponent=7"),
        ({"relative_std": 0}, r"relative_std=0 is outside .* it is a share of the run, for instance 0.10"),
        ({"relative_std": math.nan}, "relative_std=nan is outside"),
        ({"exponent": -1}, "exponent=-1 must be above -1 and finite: the mass of an average must grow"),
        ({"exponent": math.inf}, "exponent=inf must be above -1 and finite"),
    ],
)
def test_power_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Power(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of decay=, half_life= and mean_age=; got none"),
        ({"decay": 0.9, "half_life": 5}, "give exactly one of .*; got decay=0.9 and half_life=5"),
        ({"decay": 2000}, r"decay=2000 is outside \[0, 1\]; a length in steps is Exponential\(half_life=2000\)"),
        ({"decay": -0.1}, r"decay=-0.1 is outside \[0, 1\]; it is what the average keeps of itself in one step"),
        ({"decay": math.nan}, "decay=nan is outside"),
        ({"half_life": 0}, "half_life=0 must be above 0 and finite"),
        ({"mean_age": math.inf}, "mean_age=inf must be above 0 and finite"),
        ({"decay": 1, "debias": True}, r"decay=1.0 with debias=True would weigh all updates alike: use Uniform\(\)"),
    ],
)
def test_exponential_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exponential(**arguments)


@pytest.mark.parametrize("value", ["0.9", True, [0.9], 1j])
def test_lengths_are_numbers(value: Any) -> None:
    for name in ("decay", "half_life", "mean_age"):
        with pytest.raises(TypeError, match=f"{name}=.* must be a number, not {type(value).__name__}"):
            Exponential(**{name: value})
    for name in ("relative_std", "exponent"):
        with pytest.raises(TypeError, match=f"{name}=.* must be a number, not {type(value).__name__}"):
            Power(**{name: value})
