"""What differences say of a derivative: right, wrong, or that they cannot tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .slope import Difference, Slope, is_unresolved, side, slope

RIGHT, WRONG, UNSURE = "right", "wrong", "unsure"
# The function is finite on one side of the point at most, which settles nothing.
BORDER = "border"
SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found: `told` is the derivative in question.

    `found` is None where no difference is finite. At the border of a domain `where`
    says where what is compared is not finite, of the point. Beside a kink `near` is a
    distance within which there is one; zero: it is at the point.
    """

    kind: str
    told: float
    found: Slope | None
    where: str = ""
    near: float | None = None

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
        return _at_border(told, differences, tol, floor)
    if not np.isfinite(told):
        right = all(_grows_to(told, differences, which) for which in SIDES)
        return Verdict(RIGHT if right else WRONG, told, found)
    scale, off = max(abs(found.value), abs(told)), abs(found.value - told)
    if off <= tol * scale + floor:
        return Verdict(RIGHT, told, found)
    # So unsure a slope cannot tell a wrong derivative from a right one.
    if found.error > 0.1 * abs(found.value) + 100 * floor:
        # Zero beside slopes that are not: where a loss is as small as it can be.
        around = max(abs(d.right - d.left) for d in differences)
        settled = off <= found.error <= tol * around
        return Verdict(RIGHT if settled else UNSURE, told, found)
    right = off <= tol * scale + found.error
    return Verdict(RIGHT if right else WRONG, told, found)


def _at_border(
    told: float, differences: Sequence[Difference], tol: float, floor: float
) -> Verdict:
    """Compare a derivative with the differences of the one side that has any."""
    known = [s for s in (side(differences, which) for which in SIDES) if s is not None]
    if len(known) != 1:
        return Verdict(BORDER, told, None, "on either side of it")
    (one,) = known
    found = Slope(one.value, one.error, one.value, one.value)
    if np.isinf(one.value) or not np.isfinite(told):
        right = one.value == told
    else:
        scale, off = max(abs(one.value), abs(told)), abs(one.value - told)
        sure = one.error <= 0.05 * max(scale, one.largest) + 100 * floor
        right = sure and off <= tol * scale + one.error + floor
    return Verdict(RIGHT if right else BORDER, told, found, "on one side of it")


def _grows_to(told: float, differences: Sequence[Difference], which: str) -> bool:
    """Tell whether a side's differences grow without end, as a derivative is."""
    found = side(differences, which)
    return found is not None and found.value == told


def judge_rule(shares: Sequence[Share], tol: float) -> Verdict:
    """Compare a rule's share of a derivative with that of its own function.

    Both are of the same distance, so what has to vanish with it is what is between.
    """
    moved = [s for s in shares if s.moved]
    finite = [s for s in moved if np.isfinite(s.told + s.left + s.right)]
    broken = [s for s in moved if np.isfinite(s.true) and not np.isfinite(s.told)]
    if broken and not finite:
        last = broken[-1]
        # Differences of an infinite slope are finite, and grow: the rule may be right.
        if any(_grows_to(last.told, own(moved), which) for which in SIDES):
            return Verdict(UNSURE, last.told, None)
        found = Slope(last.true, 0.0, last.left, last.right)
        return Verdict(WRONG, last.told, found)
    off = slope(between(finite))
    if off is None:
        return Verdict(RIGHT, 0.0, None)
    near = next(s for s in finite if s.distance == off.distance)
    found = off.moved(near.told)
    if is_unresolved(own(finite), off.distance):
        return Verdict(UNSURE, near.told, dataclasses.replace(found, error=np.inf))
    size = max(abs(near.told), abs(found.value))
    wrong = abs(off.value) > tol * size + 2 * off.error
    return Verdict(WRONG if wrong else RIGHT, near.told, found)


def own(shares: Sequence[Share]) -> list[Difference]:
    """Return the differences of a rule's function."""
    return [Difference(s.distance, s.left, s.right, s.noise, s.noise) for s in shares]


def between(shares: Sequence[Share]) -> list[Difference]:
    """Return what is between a rule and the differences of its function."""
    return [
        Difference(s.distance, s.left - s.told, s.right - s.told, s.noise)
        for s in shares
    ]
