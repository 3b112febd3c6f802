"""One function at one point: its derivatives, and the differences beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .directions import FEW
from .judge import BORDER, UNSURE, WRONG, Share, Verdict, between, judge, judge_rule
from .measured import ByLeaf, Weighed, measure, rounding, weighed_sum
from .moved_copies import EVERY, INSIDE, LEFT, NOISE, RIGHT, TOLD
from .near import look_near
from .slope import Difference
from .sought import Reading, Sought

# By the size of the dtype. Powers of two: then a distance costs no rounding of its own.
DISTANCES = {
    4: tuple(2.0**-k for k in range(4, 13)),
    8: tuple(2.0**-k for k in range(6, 25, 2)),
}
# Where those settle nothing: rounding matters less over these.
_WIDE = {4: (1.0, 0.5, 0.25, 0.125), 8: (0.5, 0.25, 0.125, 0.0625, 0.03125)}
# And where the function changes faster than these can see, if rounding is known.
_NEAR = {4: (2.0**-14, 2.0**-16, 2.0**-18, 2.0**-20), 8: (2.0**-28, 2.0**-32, 2.0**-36)}
_TOLERANCE = {4: 1e-3, 8: 1e-6}
_UNKNOWN = 4  # times its own digits: what rounding may do to a result, if not known

# Differences of infinities are asked for as others are, and come to nan.
_NO_NUMBERS = np.errstate(invalid="ignore")

Direction = tuple[int, int]  # which leaf, and which of its directions
OfLeaves = Callable[[ByLeaf], list[Any]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The program over one distance: its results (base, plus, minus), and shares.

    Of results with many entries there is only the weighed sum.
    """

    distance: float
    sums: Sequence[tuple[float, float]]
    outs: Sequence[Sequence[np.ndarray]]
    shares: dict[int, np.ndarray]


class Compared:
    """One program at one point, in one reading, and in one mode."""

    def __init__(self, program: Weighed, reading: Reading, tol: float | None) -> None:
        """Nothing is run yet."""
        self.program, self.reading = program, reading
        size = size_of(program)
        self.size, self.tol, self.eps = size, tolerance(program, tol), eps_of(program)
        self._run = measure(program, reading)
        self._hidden = Sought(program.sites, reading).out_of_reach(program.jaxpr)
        self._steps: dict[tuple[Direction, bool], list[Measurement]] = {}
        self._noise: dict[Direction, dict[int, float]] = {}

    def reread(self, **changes: Any) -> Compared:
        """Return the same in another reading."""
        reading = dataclasses.replace(self.reading, **changes)
        return Compared(self.program, reading, self.tol)

    def steps(
        self, direction: Direction, along: jax.Array, far: bool = False
    ) -> list[Measurement]:
        """Run it over all distances along a direction of a leaf, the widest first."""
        if (direction, far) not in self._steps:
            usual = [] if not far else self.steps(direction, along)
            wide = _WIDE[self.size] if far else DISTANCES[self.size]
            near = _NEAR[self.size] if far and self.noise(direction, along) else ()
            wider, nearer = (
                [self._step(direction[0], along, h) for h in hs] for hs in (wide, near)
            )
            self._steps[direction, far] = [*wider, *usual, *nearer]
        return self._steps[direction, far]

    def _step(self, leaf: int, along: jax.Array, distance: float) -> Measurement:
        sides = [self._moved(leaf, along, h) for h in (distance, -distance)]
        outs, shares = self._run(self.program.values(), *sides)
        known = [[np.asarray(x, np.float64) for x in out] for out in outs]
        sums = [_dot(self.program.weights, out) for out in known]
        few = sum(np.size(w) for w in self.program.weights) <= FEW
        rows = {k: np.asarray(x, np.float64) for k, x in shares.items()}
        return Measurement(distance, sums, known if few else (), rows)

    def _moved(self, leaf: int, along: jax.Array, distance: float) -> list[Any]:
        leaves = list(self.program.leaves)
        leaves[leaf] = leaves[leaf] + jnp.asarray(distance, along.dtype) * along
        return leaves

    # Of the whole, and of a rule ------------------------------------------------------

    def differences(
        self,
        steps: Sequence[Measurement],
        told: float,
        noise: float | None,
        weights: Any = None,
        last: float = 0.0,
    ) -> list[Difference]:
        """Return those of the weighed result; `noise` is how far it may be off.

        None: that cannot be known, as of a solver that runs until it is content.
        `weights` other than the program's, where its results are few. `last`: the
        distance by which the argument itself is rounded, where slopes differ.
        """
        found = []
        taken = self.reading.followed | self._hidden
        for step in steps:
            h = step.distance
            sums = (
                step.sums if weights is None else [_dot(weights, x) for x in step.outs]
            )
            (base, size), (plus, _), (minus, _) = sums
            # What is followed stays at the base: the differences lack its share.
            said = sum(step.shares[key][TOLD] for key in taken) / h
            digits = self.eps * abs(told) if np.isfinite(told) else 0.0
            digit = 2 * self.eps * size
            rough = _UNKNOWN * digit if noise is None else max(digit, 2 * noise)
            left, right = (base - minus) / h + said, (plus - base) / h + said
            turned = last * abs(right - left)
            off = rough + digits + (turned if np.isfinite(turned) else 0.0)
            found.append(Difference(h, left, right, off / h, digit / h))
        return found

    def _floor(
        self, steps: Sequence[Measurement], told: float, weights: Any, last: float
    ) -> float:
        """Return what counts as zero: what the digits of all cannot show."""
        widest = [s for s in steps if s.distance <= DISTANCES[self.size][0]]
        return self.differences(widest[:1], told, 0.0, weights, last)[0].noise

    def shares(
        self, steps: Sequence[Measurement], key: int, noise: float
    ) -> list[Share]:
        """Return those of a rule."""
        found = []
        for step in steps:
            h, row = step.distance, step.shares[key]
            rough = 2 * max(abs(row[NOISE]), noise)
            numbers = (x / h for x in (row[TOLD], row[LEFT], row[RIGHT], rough))
            found.append(Share(h, *numbers))
        return found

    def noise(self, direction: Direction, along: jax.Array) -> dict[int, float]:
        """How far rounding may change the result, and what each rule hands on."""
        if direction not in self._noise:
            leaves = self._moved(direction[0], along, 1.0)
            found = (self._rounding(leaves) or {}).items()
            known = {k: float(x) for k, x in found if np.isfinite(x)}
            self._noise[direction] = known
        return self._noise[direction]

    @functools.cached_property
    def _rounding(self) -> Callable[[Any], Any]:
        sites, asked = self.program.sites, sorted(self.reading.asked)
        known = [key for key in asked if _jax.kind_of(sites[key].eqn) in _jax.CUSTOM]
        return rounding(self.program, self.reading.forward, known)

    @_NO_NUMBERS
    def judge_rule(
        self, key: int, direction: Direction, along: jax.Array, carefully: bool
    ) -> Verdict:
        """Compare a rule with its function along a direction."""
        steps = self.steps(direction, along, carefully)
        known = self.noise(direction, along) if carefully else {}
        # The function of a `with_backward` is not in its equation: what is rounded
        # there is known for all of them together.
        other = (_jax.gate_name(self.program.sites[key].eqn) and INSIDE) or EVERY
        noise = known.get(key, known.get(other, 0.0))
        shares = self.shares(steps, key, noise)
        verdict = judge_rule(shares, self.tol)
        if carefully:

            def share(distance: float) -> Difference:
                step = self._step(direction[0], along, distance)
                return between(self.shares([step], key, 0.0))[0]

            close, digit = self.tol * abs(verdict.told), self._digit(direction, along)
            verdict = look_near(verdict, 0.0, close, between(shares), digit, share)
        if self.program.is_left_out(verdict.told):
            return dataclasses.replace(verdict, kind=UNSURE)
        return verdict

    @_NO_NUMBERS
    def judge(
        self,
        told: float,
        direction: Direction,
        along: jax.Array,
        carefully: bool = False,
        weights: Any = None,
    ) -> Verdict:
        """Compare a derivative by a leaf with what the program declares."""
        steps = self.steps(direction, along, carefully)
        known = self.noise(direction, along) if carefully else {}
        noise = known.get(EVERY) if carefully else 0.0
        last = self._digit(direction, along)
        found = self.differences(steps, told, noise, weights, last)
        floor = self._floor(steps, told, weights, last)
        verdict = judge(told, found, self.tol, floor)
        if carefully:

            def probe(distance: float) -> Difference:
                step = self._step(direction[0], along, distance)
                return self.differences([step], told, 0.0, weights)[0]

            close = self.tol * abs(told)
            verdict = look_near(verdict, told, close, found, last, probe)
        ends = [end for step in steps for end in step.sums]
        if verdict.kind == BORDER and np.all(np.isfinite(ends)):  # it is a rule's word
            return dataclasses.replace(verdict, kind=WRONG)
        return verdict

    def _digit(self, direction: Direction, along: jax.Array) -> float:
        return digit_of(self.program.leaves[direction[0]], along)

    @_NO_NUMBERS
    def is_flat(self, direction: Direction, along: jax.Array) -> bool:
        """Tell whether differences vanish that do not over longer distances."""
        found = self.differences(self.steps(direction, along), 0.0, 0.0)
        moved = [abs(d.central) > 10 * d.noise for d in found]
        return found[-1].central == 0 and any(moved)


def size_of(program: Weighed) -> int:
    """Return the size of the narrowest leaf's dtype."""
    return min(program.leaves[k].dtype.itemsize for k in program.places)


def distances_of(program: Weighed, far: bool = False) -> tuple[float, ...]:
    """Return the distances over which differences are taken, the widest first."""
    size = size_of(program)
    return (*_WIDE[size], *DISTANCES[size]) if far else DISTANCES[size]


def tolerance(program: Weighed, tol: float | None) -> float:
    """Return the largest relative error."""
    return _TOLERANCE[size_of(program)] if tol is None else tol


def eps_of(program: Weighed) -> float:
    """Return the rounding unit of the narrowest leaf."""
    return float(np.finfo(np.float32 if size_of(program) == 4 else np.float64).eps)


def digit_of(leaf: jax.Array, along: jax.Array) -> float:
    """Return the distance along a direction over which all entries move that do."""
    x, v = (np.abs(np.asarray(y, np.float64)) for y in (leaf, along))
    moves = (v > 0) & np.isfinite(x)
    most = float(np.max(x[moves] / v[moves], initial=1.0))
    return float(np.finfo(leaf.dtype).eps) * most


def _dot(weights: Sequence[Any], outs: Sequence[Any]) -> tuple[float, float]:
    """Return the weighed sum, and the sum of magnitudes; weight zero leaves out."""
    pairs = [(np.asarray(w, np.float64), x) for w, x in zip(weights, outs, strict=True)]
    terms = [w * np.where(w == 0, 0, out) for w, out in pairs]
    size = float(sum(np.abs(t).sum() for t in terms))
    return float(sum(t.sum() for t in terms)), size


# What JAX says ------------------------------------------------------------------------


def slope_of(
    mode: str,
    function: OfLeaves,
    values: ByLeaf,
    directions: Sequence[ByLeaf],
    weights: Sequence[Any],
) -> list[Any]:
    """Return the directional derivatives of the weighed result."""
    if mode == "rev":
        out, pull = jax.vjp(function, values)
        cts = [jnp.asarray(w, o.dtype) for w, o in zip(weights, out, strict=True)]
        (grads,) = pull(cts)
        return [
            sum(weighed_sum(v, grads[k].conj()) for k, v in direction.items())
            for direction in directions
        ]
    slopes = []
    for direction in directions:
        dots = {k: direction.get(k, jnp.zeros_like(x)) for k, x in values.items()}
        out = jax.jvp(function, (values,), (dots,))[1]
        pairs = zip(weights, out, strict=True)
        slopes.append(sum(weighed_sum(w, dot) for w, dot in pairs))
    return slopes
