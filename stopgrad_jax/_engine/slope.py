"""Read a derivative, and how sure it is, off differences over several distances.

Too far apart, differences are off by the curvature, or cross a kink; too near, by
rounding. So they are extrapolated to no distance at all, and the distance is taken at
which the extrapolations agree best.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences of a function over one distance.

    Attributes:
      left, right: those of either side, divided by the distance.
      noise: what rounding may do to them.
    """

    distance: float
    left: float
    right: float
    noise: float

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


def slope(differences: Sequence[Difference]) -> Slope | None:
    """Extrapolate differences, the widest first; None if too few are finite.

    Reference:
      Ridders (1982), "Accurate computation of F'(x) and F'(x)F''(x)".
    """
    finite = [d for d in differences if np.isfinite(d.left + d.right)]
    best = None
    for k, (wide, near) in enumerate(itertools.pairwise(finite)):
        ratio = (wide.distance / near.distance) ** 2
        value = near.central + (near.central - wide.central) / (ratio - 1)
        nearer = (_still_off(value, near, finite, j) for j in range(k + 2, len(finite)))
        error = max(abs(value - near.central), *nearer, 0.0) + near.noise
        if best is None or error < best.error:
            part = near.distance / (wide.distance - near.distance)
            left = near.left + part * (near.left - wide.left)
            right = near.right + part * (near.right - wide.right)
            best = Slope(value, error, left, right, near.distance)
    return best


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
