"""Read a derivative, and how sure it is, off differences over several distances.

Too far apart, differences are off by the curvature, or cross a kink; too near, by
rounding. So they are extrapolated to no distance at all, and the distance is taken at
which the extrapolations agree best.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences of a function over one distance.

    Attributes:
      left, right: those of either side, divided by the distance.
      noise: what rounding may do to them.
      digit: what the rounding of the result itself may do.
    """

    distance: float
    left: float
    right: float
    noise: float
    digit: float = 0.0

    @property
    def central(self) -> float:
        """Their mean."""
        return (self.left + self.right) / 2


@dataclasses.dataclass(frozen=True)
class Slope:
    """A derivative, how far it may be off, and those of either side.

    `distance` is that over which it was read; those of the sides are extrapolated, too.
    """

    value: float
    error: float
    left: float
    right: float
    distance: float = 0.0

    @property
    def is_at_kink(self) -> bool:
        """Whether the two sides differ by more than curvature does."""
        largest = max(abs(self.left), abs(self.right))
        return abs(self.left - self.right) > 0.1 * largest + 4 * self.error

    def moved(self, by: float) -> Slope:
        """Return the same of a function with a slope more."""
        sides = {"left": self.left + by, "right": self.right + by}
        return dataclasses.replace(self, value=self.value + by, **sides)


def slope(differences: Sequence[Difference]) -> Slope | None:
    """Extrapolate differences, the widest first; None if too few are finite.

    The error is infinite where the function varies faster than any of them can see.

    Reference:
      Ridders (1982), "Accurate computation of F'(x) and F'(x)F''(x)".
    """
    finite = [d for d in differences if np.isfinite(d.left + d.right)]
    best = None
    for k, (wide, near) in enumerate(itertools.pairwise(finite)):
        # Central differences are off by the square of the distance, those of one side,
        # further down, by the distance itself.
        ratio = (wide.distance / near.distance) ** 2
        value = near.central + (near.central - wide.central) / (ratio - 1)
        nearer = (_still_off(value, near, finite, j) for j in range(k + 2, len(finite)))
        error = max(abs(value - near.central), *nearer, 0.0) + near.noise
        if best is None or error < best.error:
            part = near.distance / (wide.distance - near.distance)
            left = near.left + part * (near.left - wide.left)
            right = near.right + part * (near.right - wide.right)
            best = Slope(value, error, left, right, near.distance)
    if best is not None and is_unresolved(finite, best.distance):
        return dataclasses.replace(best, error=np.inf)
    return best


def is_unresolved(differences: Sequence[Difference], distance: float) -> bool:
    """Tell whether a function changes by as much over all distances, down to the least.

    Then what is bounded seems flat over a long one, and differences that are nearer
    grow as noise does. It is so on both sides: a jump at the point is on one of them
    only, as is what is constant beyond a kink.

    Args:
      differences: the widest first.
      distance: that over which the derivative was read.
    """
    finite = [d for d in differences if np.isfinite(d.left + d.right)]
    return all(
        _stays({d.distance: _change(d, o) for d in finite}, distance)
        for o in (min, max)
    )


def _stays(changes: Mapping[float, float], distance: float) -> bool:
    nearer = [c for h, c in changes.items() if h <= distance / 4]
    if len(nearer) > 1:
        return float(np.median(nearer)) > changes[distance] / 4
    wider = [c for h, c in changes.items() if h >= distance * 4]
    return bool(wider) and changes[distance] > float(np.median(wider)) / 3


def _change(d: Difference, of: Callable[..., float]) -> float:
    """How much a function surely changes over a distance, on one of its sides."""
    return max(of(abs(d.left), abs(d.right)) - d.digit, 0.0) * d.distance


def _still_off(
    value: float, near: Difference, differences: Sequence[Difference], j: int
) -> float:
    """How far a nearer difference says that a value is off.

    Two may agree by chance, across a kink: those that are nearer tell. But if these do
    not agree among themselves, that is noise, as of a solver that stops early, and
    there is less of it over a longer distance.
    """
    here, around = differences[j], differences[max(j - 1, 0) : j + 2]
    off = abs(value - here.central)
    scatter = max(abs(d.central - here.central) for d in around)
    part = here.distance / near.distance if scatter > off / 2 else 1.0
    return (off - here.noise) * part


# Where the function is finite on one side only ----------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """What the differences of one side come to: a derivative, or no number.

    `value` is infinite where they grow without end, `error` where they settle nothing.
    """

    value: float
    error: float
    largest: float


def side(differences: Sequence[Difference], which: str) -> Side | None:
    """Extrapolate the differences of one side ("left", "right"); None: none is finite.

    They may change with any power of the distance, as those of `x ** 1.5` at zero do.

    Reference:
      Aitken (1926), "On Bernoulli's numerical solution of algebraic equations".
    """
    pairs = [(d, float(getattr(d, which))) for d in differences]
    finite = [(d, value) for d, value in pairs if np.isfinite(value)]
    if not finite:
        return None
    values = [value for _, value in finite]
    largest, last = max(map(abs, values)), values[-1]
    if _grows(values):
        return Side(np.copysign(np.inf, last), 0.0, largest)
    best, before = Side(last, np.inf, largest), None
    for (far, x), (mid, y), (near, z) in _threes(finite):
        first, second = y - x, z - y
        even = far.distance / mid.distance == mid.distance / near.distance
        ratio = second / first if first else float(second != 0)
        # What is left of a sum whose terms shrink to nine tenths, if not to less.
        found = [Side(z, 10 * abs(second) + near.noise, largest)]
        value = None
        if even and abs(ratio) <= 0.9:
            value = z + second * ratio / (1 - ratio)
        if value is not None and before is not None:
            error = abs(value - before) + near.noise / (1 - ratio) ** 2
            found.append(Side(value, error, largest))
        best, before = min(best, *found, key=lambda s: s.error), value
    return best


def one_sided(differences: Sequence[Difference], which: str) -> Side | None:
    """Extrapolate the differences of one side of a point at which all is finite.

    They change with the distance by the curvature, and by a kink on this side.
    """
    pairs = [(d, float(getattr(d, which))) for d in differences]
    finite = [(d, value) for d, value in pairs if np.isfinite(value)]
    largest = max((abs(value) for _, value in finite), default=0.0)
    best = None
    for k, ((wide, far), (near, here)) in enumerate(itertools.pairwise(finite)):
        ratio = wide.distance / near.distance
        value = here + (here - far) / (ratio - 1)
        nearer = (abs(value - other) - d.noise for d, other in finite[k + 2 :])
        error = max(abs(value - here), *nearer, 0.0) + near.noise
        if best is None or error < best.error:
            best = Side(value, error, largest)
    return best


def _threes(finite: Sequence[Any]) -> Iterator[Any]:
    return zip(finite, finite[1:], finite[2:], strict=False)


def _grows(values: Sequence[float]) -> bool:
    """Tell whether the nearest differences grow, by no less from one to the next."""
    nearest = values[-5:]
    more = np.diff(np.abs(nearest))
    alike = len(nearest) == 5 and len(set(np.sign(nearest))) == 1
    return alike and more[0] > 0 and bool(np.all(more[1:] > 0.9 * more[:-1]))
