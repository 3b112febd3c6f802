"""The derivative of the gradient, and differences of the gradient beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checked import Checked
from .compare import Direction, OfLeaves, digit_of, distances_of, slope_of
from .judge import RIGHT, Verdict, judge
from .measured import ByLeaf, Weighed, rounding
from .moved_copies import EVERY, Moved
from .near import look_near
from .sites import sites_in
from .slope import Difference
from .sought import Reading


def compare_second(checked: Checked, mode: str) -> None:
    """Compare the derivative of a directional derivative, leaf by leaf."""
    second = _Second(checked, mode)
    for direction, told in second.told().items():
        verdict = second.judge(direction, told, carefully=False)
        if verdict.kind != RIGHT:
            verdict = second.judge(direction, told, carefully=True)
        if verdict.kind != RIGHT:
            how = f"{mode}, second order"
            raise checked.wrong_leaf(verdict, direction, how, second.every)


class _Second:
    def __init__(self, checked: Checked, mode: str) -> None:
        self._checked, self._mode = checked, mode
        self._program = program = checked.program
        # In one direction of all entries together, and then in each.
        every = {k: jnp.zeros_like(x) for k, x in program.values().items()}
        parts = np.random.RandomState(1).uniform(0.5, 1.5, len(checked.along))
        for ((k, _), v), w in zip(checked.along.items(), parts, strict=True):
            every[k] += jnp.asarray(w, v.dtype) * v
        self.every = every
        self._run = functools.partial(jax.jit(self._slope), program.leaves)
        self._base = float(self._run(program.values()))

    def _slope(self, point: Sequence[Any], values: ByLeaf) -> Any:
        # The point is an operand, so that XLA rounds at it as where JAX's derivative is
        # computed: of constants a rounding that is a tie may come out otherwise.
        return self._first(functools.partial(self._moved, point), values)

    def _moved(self, point: Sequence[Any], values: ByLeaf) -> list[Any]:
        """Run what is declared at the point, where the values have moved to."""
        program, checked = self._program, self._checked
        reading = Reading(followed=checked.followed(), freed=checked.freed)
        moved = Moved(program.sites, reading)
        copies = [point, program.filled(values)]
        outs = moved.run(program.jaxpr, program.consts, copies, {})
        return program.kept(outs[1])

    def _first(self, function: OfLeaves, values: ByLeaf) -> Any:
        weights = self._program.weights
        return slope_of(self._mode, function, values, [self.every], weights)[0]

    def told(self) -> dict[Direction, float]:
        """Return the second derivatives, as JAX says."""
        function = functools.partial(self._first, self._checked.function)

        def second(values: ByLeaf, directions: Sequence[ByLeaf], weights: Any) -> Any:
            def again(values: ByLeaf) -> list[Any]:
                return [function(values)]

            return slope_of(self._mode, again, values, directions, weights)

        return self._checked.each(second)([1.0])

    def judge(self, direction: Direction, told: float, carefully: bool) -> Verdict:
        """Compare one of them with the differences of the gradient."""
        line, tol = self._checked.along[direction], self._checked.tol

        def over(h: float) -> Difference:
            return self._difference(direction, told, h)

        found = list(map(over, distances_of(self._program, carefully)))
        floor = next(
            d.noise for d in found if d.distance <= distances_of(self._program)[0]
        )
        if carefully:
            noise = 2 * self._noise(direction)
            found = [
                dataclasses.replace(d, noise=d.noise + noise / d.distance)
                for d in found
            ]
        verdict = judge(told, found, tol, floor)
        if carefully:
            digit = digit_of(self._program.leaves[direction[0]], line)
            verdict = look_near(verdict, told, tol * abs(told), found, digit, over)
        if not np.isfinite(self._base):
            return dataclasses.replace(verdict, where="at it")
        return verdict

    def _difference(self, direction: Direction, told: float, h: float) -> Difference:
        start, eps, k = self._program.values(), self._checked.eps, direction[0]
        step = jnp.asarray(h, start[k].dtype) * self._checked.along[direction]
        sides = (start[k] + step, start[k] - step)
        plus, minus = (float(self._run(start | {k: x})) for x in sides)
        base = self._base
        digits = eps * abs(told) if np.isfinite(told) else 0.0
        own = 8 * eps * max(abs(base), abs(plus)) / h
        noise = own + digits / h
        return Difference(h, (base - minus) / h, (plus - base) / h, noise, own)

    def _noise(self, direction: Direction) -> float:
        """How far rounding may change the gradient."""
        start, k = self._program.values(), direction[0]
        moved = start | {k: start[k] + self._checked.along[direction]}
        found = self._rounding(jax.tree.leaves(moved)) or {EVERY: np.zeros(())}
        noise = float(found[EVERY])
        return noise if np.isfinite(noise) else 0.0

    @functools.cached_property
    def _rounding(self) -> Any:
        leaves, structure = jax.tree.flatten(self._program.values())

        def moved(*leaves: Any) -> Any:
            return self._slope(self._program.leaves, structure.unflatten(leaves))

        closed = jax.make_jaxpr(moved)(*leaves)
        places, sites = list(range(len(leaves))), sites_in(closed.jaxpr)
        one = [jnp.ones(())]
        program = Weighed(closed.jaxpr, closed.consts, leaves, places, [0], one, sites)
        return rounding(program, self._mode == "fwd", [])
