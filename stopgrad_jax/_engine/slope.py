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
        # Two may agree by chance, across a kink: those that are nearer tell. What they
        # are off by may be noise, as of a solver that stops early: then it is less here.
        nearer = (
            (abs(value - d.central) - d.noise) * d.distance / near.distance
            for d in finite[k + 2 :]
        )
        error = max(abs(value - near.central), *nearer, 0.0) + near.noise
        if best is None or error < best.error:
            part = near.distance / (wide.distance - near.distance)
            left = near.left + part * (near.left - wide.left)
            right = near.right + part * (near.right - wide.right)
            best = Slope(value, error, left, right, near.distance)
    return best
