"""What differences say of a derivative: right, wrong, or that they cannot tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stopgrad_jax._engine.slope import Difference, Slope, slope

RIGHT, WRONG, UNSURE = "right", "wrong", "unsure"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found: `told` is the derivative in question.

    `found` is None where no difference is finite.
    """

    kind: str
    told: float
    found: Slope | None

    @property
    def value(self) -> float:
        """The derivative by differences."""
        return np.nan if self.found is None else self.found.value


@dataclasses.dataclass(frozen=True)
class Share:
    """A rule's share of a derivative, over one distance and divided by it.

    `told` by the rule, `left` and `right` by the differences of its function.
    """

    distance: float
    told: float
    left: float
    right: float
    noise: float

    @property
    def moved(self) -> bool:
        """Whether the operands of the rule moved at all: narrow ones may not."""
        return bool(self.told or self.left or self.right)

    @property
    def true(self) -> float:
        """The share by differences."""
        return (self.left + self.right) / 2


def judge(
    told: float, differences: Sequence[Difference], tol: float, floor: float
) -> Verdict:
    """Compare a derivative with differences; `floor` is what counts as zero."""
    found = slope(differences)
    if found is None:
        return Verdict(WRONG, told, found)
    scale, off = max(abs(found.value), abs(told)), abs(found.value - told)
    if off <= tol * scale + floor:
        return Verdict(RIGHT, told, found)
    if found.error > 0.1 * abs(found.value) + 100 * floor and np.isfinite(told):
        return Verdict(UNSURE, told, found)
    right = off <= tol * scale + found.error
    return Verdict(RIGHT if right else WRONG, told, found)


def judge_rule(shares: Sequence[Share], tol: float) -> Verdict:
    """Compare a rule's share of a derivative with that of its own function.

    Both are of the same distance, so what has to vanish with it is what is between.
    """
    moved = [s for s in shares if s.moved]
    finite = [s for s in moved if np.isfinite(s.told + s.left + s.right)]
    broken = [s for s in moved if np.isfinite(s.true) and not np.isfinite(s.told)]
    if broken and not finite:
        last = broken[-1]
        found = Slope(last.true, 0.0, last.left, last.right)
        return Verdict(WRONG, last.told, found)
    between = slope(
        [
            Difference(s.distance, s.left - s.told, s.right - s.told, s.noise)
            for s in finite
        ]
    )
    if between is None:
        return Verdict(RIGHT, 0.0, None)
    near = next(s for s in finite if s.distance == between.distance)
    found = dataclasses.replace(
        between,
        value=near.told + between.value,
        left=near.told + between.left,
        right=near.told + between.right,
    )
    size = max(abs(near.told), abs(found.value))
    wrong = abs(between.value) > tol * size + 2 * between.error
    return Verdict(WRONG if wrong else RIGHT, near.told, found)
