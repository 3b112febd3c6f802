"""Kinks at the point, and kinks so near it that differences cannot look between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .judge import SIDES, UNSURE, WRONG, Verdict
from .slope import Difference, Slope, one_sided

# Of a distance: the differences over it.
Probe = Callable[[float], Difference]
_DIGITS = (1.0, 2.0, 4.0)  # of the argument, its last: the nearest distances


def look_near(
    verdict: Verdict,
    told: float,
    close: float,
    differences: Sequence[Difference],
    digit: float,
    probe: Probe,
) -> Verdict:
    """Accuse no derivative that is right on its side of a kink beside the point.

    Over distances that rounding leaves to look at, a kink that is nearer looks as if it
    were at the point. But the derivative of the point is that of one of the sides, and
    it is one that is asked for, unless the kink is seen at the point itself.

    Args:
      verdict: what was found of the derivative.
      told: the derivative, as in the differences.
      close: how far it may be off for tolerance.
      differences: over several distances, the widest first.
      digit: the distance over which the argument moves by its last digit.
      probe: returns the differences over a distance.
    """
    found = verdict.found
    if verdict.kind not in (WRONG, UNSURE) or found is None:
        return verdict
    if np.isinf(found.error):  # what varies so fast seems to have a kink anywhere
        return verdict
    shift = verdict.told - told  # of rules, the differences are of what is between
    found = found.moved(-shift)
    off = abs(found.value - told)
    differences = [_rounded(d, digit) for d in differences]
    agrees = [_agrees(differences, which, told, close, off) for which in SIDES]
    if not any(agrees) and not (verdict.kind == WRONG and found.is_at_kink):
        return verdict
    if any(agrees):  # the other side makes the mean what it is
        other = 2 * found.value - told
        left, right = (told, other) if agrees[0] else (other, told)
        found = dataclasses.replace(found, left=left, right=right)
    if _is_at([probe(k * digit) for k in _DIGITS], found):
        return dataclasses.replace(verdict, near=0.0)
    kind = UNSURE if any(agrees) else verdict.kind
    return dataclasses.replace(verdict, kind=kind, near=_distance(differences, found))


def _rounded(d: Difference, digit: float) -> Difference:
    """Return the same, with what the rounding of the distance itself may do to it."""
    slopes = abs(d.left - d.right)
    return dataclasses.replace(d, noise=d.noise + digit / d.distance * slopes)


def _agrees(
    differences: Sequence[Difference], which: str, told: float, close: float, off: float
) -> bool:
    """Tell whether the differences of a side are the derivative, and the mean is not.

    Where there is no kink both sides are what the mean is, and so off by as much.
    """
    side = one_sided(differences, which)
    if side is None or not side.error <= off / 4:
        return False
    return abs(side.value - told) <= min(close + side.error, off / 2)


def _is_at(nearest: Sequence[Difference], found: Slope) -> bool:
    """Tell whether the slopes of both sides are seen down to the last digits."""
    jump = abs(found.left - found.right)
    clear = next((d for d in nearest if d.noise <= jump / 2), None)
    if clear is None:
        return False
    off = abs(clear.left - found.left), abs(clear.right - found.right)
    return max(off) <= jump / 5


def _distance(differences: Sequence[Difference], found: Slope) -> float:
    """Return a distance at which the slopes of both sides are seen to differ."""
    half = abs(found.left - found.right) / 2
    seen = [d for d in differences if abs(d.right - d.left) - d.noise > half]
    return min((d.distance for d in seen), default=differences[0].distance)
