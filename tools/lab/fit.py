"""Fit: how a cost grows with a length, by least squares, and how well that holds. Pure; numpy.

Curves are fitted by relative error (each point weighs 1/y): the points span decades, and the largest
would dominate otherwise. The reported curve is the simplest whose worst point is off by WORST at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.lab.phrasing import number

WORST = 0.10  # largest relative error of a curve that describes the points
CURVES = {"constant": 0, "linear": 1, "quadratic": 2}  # degree
POINTS = {"constant": 3, "linear": 3, "quadratic": 5}  # fewest points: a curve fits fewer exactly


@dataclass(frozen=True, slots=True)
class Curve:
    """y = c0 + c1 x + c2 x^2. `worst`: the largest relative distance of a point; `r2`: 1 is perfect."""

    name: str
    coefficients: tuple[float, ...]  # lowest power first
    r2: float
    worst: float

    def at(self, x: float) -> float:
        """The value at x."""
        return sum(c * x**power for power, c in enumerate(self.coefficients))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = factor * x^exponent. `error` is the standard error of the exponent, None for two points."""

    exponent: float
    factor: float
    error: float | None
    r2: float

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {number(self.error)}"
        return f"x^{number(self.exponent)}{error}"


def curve(name: str, x: Sequence[float], y: Sequence[float]) -> Curve | None:
    """The best curve of this name. None if there are too few points, or if the curve falls anywhere: a
    cost only grows, so that would be a fit to noise."""
    degree = CURVES[name]
    if len(x) < POINTS[name]:
        return None
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    scale = xs.max()
    powers = np.vander(xs / scale, degree + 1, increasing=True)
    solved = np.linalg.lstsq(powers / ys[:, None], np.ones(len(ys)), rcond=None)[0]
    if (solved[1:] < 0).any():
        return None
    fitted = powers @ solved
    coefficients = tuple(float(c / scale**power) for power, c in enumerate(solved))
    return Curve(name, coefficients, _r2(ys, fitted), float(np.abs(fitted / ys - 1).max()))


def simplest(x: Sequence[float], y: Sequence[float], worst: float = WORST) -> Curve | None:
    """The first of constant, linear, quadratic whose relative error is `worst` at most everywhere."""
    tried = (curve(name, x, y) for name in CURVES)
    return next((each for each in tried if each is not None and each.worst <= worst), None)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The line through the logarithms. None for fewer than two points."""
    if len(x) < 2:
        return None
    xs, ys = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centred = xs - xs.mean()
    spread = float(centred @ centred)
    exponent = float(centred @ ys) / spread
    offset = float(ys.mean() - exponent * xs.mean())
    left = ys - (offset + exponent * xs)
    error = None
    if len(x) > 2:
        error = math.sqrt(float(left @ left) / (len(x) - 2) / spread)
    fitted = np.exp(offset + exponent * xs)
    return PowerLaw(exponent, math.exp(offset), error, _r2(np.exp(ys), fitted))


def _r2(measured: np.ndarray, fitted: np.ndarray) -> float:
    left = float(((measured - fitted) ** 2).sum())
    all_ = float(((measured - measured.mean()) ** 2).sum())
    return 1.0 - left / all_ if all_ else float(left == 0)
