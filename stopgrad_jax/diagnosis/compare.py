"""One function at one point: its derivatives, and the differences beside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._engine.declared import Declared
from stopgrad_jax._engine.slope import Difference, Slope, slope
from stopgrad_jax._engine.trace import Traced
from stopgrad_jax._errors import beats, quoted, type_of

# By the size of the dtype. Powers of two: then a distance costs no rounding of its own.
DISTANCES = {
    4: tuple(2.0**-k for k in range(4, 13)),
    8: tuple(2.0**-k for k in range(6, 25, 2)),
}
_TOLERANCE = {4: 1e-3, 8: 1e-6}
_FEW = 8  # entries of a leaf that are moved one by one

Direction = tuple[int, int]  # which leaf, and which of its directions
Values = dict[int, Any]  # of the leaves to differentiate by
Function = Callable[[Values], list[Any]]


class Checked:
    """One traced function at one point."""

    def __init__(
        self,
        traced: Traced,
        places: dict[int, str],
        allow: tuple[str, ...],
        called: str,
        tol: float | None,
    ) -> None:
        """Run the function near its arguments; meet every custom rule."""
        self.called, self.places = called, places
        self.leaves = [jnp.asarray(x) for x in traced.leaves]
        self._declared = Declared(allow)
        self._jaxpr, self._consts = traced.jaxpr, traced.consts
        outs = [v.aval for v in traced.jaxpr.outvars]
        self._outs = [k for k, a in enumerate(outs) if _jax.is_differentiable(a)]
        strange = [a for a in outs if jnp.issubdtype(a.dtype, jnp.complexfloating)]
        if strange:
            raise TypeError(
                beats(
                    called,
                    f"{traced.name} returns real numbers",
                    ", ".join(map(type_of, strange)),
                    "a function that returns z.real and z.imag",
                )
            )
        if not self._outs:
            raise TypeError(
                beats(
                    called,
                    f"{traced.name} returns at least one array of floats",
                    ", ".join(map(type_of, outs)) or "no array",
                    "a function whose result carries a gradient",
                )
            )
        rng = np.random.RandomState(0)
        self._cts = [_unit(rng, outs[k]) for k in self._outs]
        self._directions = {
            (k, n): v for k in places for n, v in enumerate(_along(rng, self.leaves[k]))
        }
        size = min(self.leaves[k].dtype.itemsize for k in places)
        self._distances = DISTANCES[size]
        self._ratio = (self._distances[0] / self._distances[1]) ** 2
        self.tol = _TOLERANCE[size] if tol is None else tol
        self._eps = float(np.finfo(np.float32 if size == 4 else np.float64).eps)
        self._run = jax.jit(self._triple)
        self._run(self.leaves, self.leaves, self.leaves)  # meets every rule
        self._require_met(allow)
        self._reports: dict[str, list[list[np.ndarray]]] = {}
        self._slopes = {d: self._differences(d) for d in self._directions}

    def _require_met(self, allow: tuple[str, ...]) -> None:
        known = {name for names in self._declared.rules.values() for name in names}
        unknown = sorted(set(allow) - known)
        if unknown:
            raise ValueError(
                beats(
                    self.called,
                    "allow names functions with a custom rule that fun calls",
                    quoted(unknown),
                    f"one of {quoted(sorted(known))}"
                    if known
                    else "allow=(): it calls none",
                )
            )

    def _triple(self, *copies: Any) -> Any:
        outs, reports = self._declared.run(self._jaxpr, self._consts, copies)
        return [[out[k] for k in self._outs] for out in outs], reports

    def _moved(self, direction: Direction, distance: float) -> list[Any]:
        leaves, (k, _) = list(self.leaves), direction
        step = jnp.asarray(distance, leaves[k].dtype) * self._directions[direction]
        leaves[k] = leaves[k] + step
        return leaves

    # Custom rules ------------------------------------------------------------------

    def _differences(self, direction: Direction) -> list[Difference]:
        """Move along a direction; what is compared on the way is noted, too."""
        found, reports = [], dict[str, list[np.ndarray]]()
        for h in self._distances:
            sides = self._moved(direction, h), self._moved(direction, -h)
            outs, compared = self._run(self.leaves, *sides)
            for name, report in compared.items():
                scaled = np.asarray(report, np.float64) / h
                reports.setdefault(name, []).append(scaled)
            (base, size), (plus, _), (minus, _) = map(self._dot, outs)
            noise = 2 * self._eps * size / h
            found.append(Difference(h, (base - minus) / h, (plus - base) / h, noise))
        for name, found_here in reports.items():
            self._reports.setdefault(name, []).append(found_here)
        return found

    def compare_rules(self) -> None:
        """Compare each custom rule with the differences of its own function."""
        for name, directions in self._reports.items():
            for reports in directions:
                if not self._is_right(reports):
                    self._accuse(name, reports)

    def _is_right(self, reports: Sequence[np.ndarray]) -> bool:
        """Whether the difference goes to zero with the distance, but for rounding."""
        moved = [r for r in reports if r[1] != 0]
        pairs = list(itertools.pairwise(moved))
        if not pairs:  # both are zero, or a narrow operand does not move
            return True
        sure = [(a, b) for a, b in pairs if b[2] <= self.tol * b[1]] or pairs
        for (wide, *_), (near, size, noise, *_) in sure:
            limit = near - (wide - near) / (self._ratio - 1)
            if abs(limit) <= 2 * self.tol * size + noise:
                return True
        return False

    def _accuse(self, name: str, reports: Sequence[np.ndarray]) -> None:
        finite = [r for r in reports if np.isfinite(r).all()] or reports
        nearest = min(finite, key=lambda r: float(r[0] + r[2]))
        true, told, left, right = nearest[3:]
        hint = _kink(Slope(true, nearest[2], left, right))
        raise AssertionError(
            f"{self.called}: the rule of {name} is not the derivative of its function: "
            f"{true:.6g} by differences, {told:.6g} by the rule{hint}"
            f'\n  write: allow=["{self._declared.rules[name][0]}"], if it differs on '
            "purpose"
        )

    # Leaves ------------------------------------------------------------------------

    def compare(self, mode: str) -> None:
        """Compare first derivatives, leaf by leaf."""

        def along(values: Values, directions: Sequence[Values]) -> list[Any]:
            return self._slope(mode, self._function, values, directions)

        for direction, told in self._each(along).items():
            self._judge(direction, told, self._slopes[direction], mode)

    def compare_second(self, mode: str) -> None:
        """Compare the derivative of a directional derivative, leaf by leaf."""
        start = self._values()
        # In one direction of all entries together, and then in each.
        every = {k: jnp.zeros_like(x) for k, x in start.items()}
        weights = np.random.RandomState(1).uniform(0.5, 1.5, len(self._directions))
        for ((k, _), v), w in zip(self._directions.items(), weights, strict=True):
            every[k] += jnp.asarray(w, v.dtype) * v

        def declared(values: Values) -> list[Any]:
            copies = [self.leaves, self._filled(values)]
            outs, _ = self._declared.run(self._jaxpr, self._consts, copies)
            return [outs[1][k] for k in self._outs]

        def first(function: Function, values: Values) -> Any:
            return self._slope(mode, function, values, [every])[0]

        def second(values: Values, directions: Sequence[Values]) -> list[Any]:
            function = functools.partial(first, self._function)
            return self._slope(mode, lambda v: [function(v)], values, directions, [1.0])

        slope = jax.jit(functools.partial(first, declared))
        base = float(slope(start))
        for direction, told in self._each(second).items():
            k, found = direction[0], []
            for h in self._distances:
                sides = (self._moved(direction, s)[k] for s in (h, -h))
                plus, minus = (float(slope(start | {k: x})) for x in sides)
                noise = 8 * self._eps * max(abs(base), abs(plus)) / h
                found.append(
                    Difference(h, (base - minus) / h, (plus - base) / h, noise)
                )
            self._judge(direction, told, found, f"{mode}, second order")

    def _dot(self, outs: Sequence[Any]) -> tuple[float, float]:
        terms = [
            np.asarray(ct, np.float64) * np.asarray(out, np.float64)
            for ct, out in zip(self._cts, outs, strict=True)
        ]
        size = float(sum(np.abs(t).sum() for t in terms))
        return float(sum(t.sum() for t in terms)), size

    def _judge(
        self,
        direction: Direction,
        told: float,
        differences: Sequence[Difference],
        how: str,
    ) -> None:
        noisy = [  # rounding of the operand itself
            dataclasses.replace(d, noise=d.noise + self._eps * abs(told) / d.distance)
            for d in differences
        ]
        found = slope(noisy)
        k, n = direction
        few = self.leaves[k].ndim > 0 and self.leaves[k].size <= _FEW
        index = list(map(int, np.unravel_index(n, self.leaves[k].shape))) if few else ""
        said = (
            f"{self.called}: wrong derivative by {self.places[k]}{index} ({how})"
            f"{'' if few else ', along a random direction'}: "
        )
        if found is None:
            raise AssertionError(f"{said}nan by differences, {told:.6g} by JAX")
        numbers = f"{found.value:.6g} by differences, {told:.6g} by JAX"
        scale = max(abs(found.value), abs(told))
        off = abs(found.value - told)
        if off <= self.tol * scale + differences[0].noise:
            return
        unsure = found.error > 0.1 * abs(found.value) + 100 * differences[0].noise
        if unsure and np.isfinite(told):
            raise AssertionError(
                f"{said}{numbers}; but the differences are only known to "
                f"{found.error:.2g}{_kink(found)}\n  write: float64 throughout, or a "
                "point where the function is less curved"
            )
        if not off <= self.tol * scale + found.error:
            raise AssertionError(said + numbers + _kink(found))

    # What JAX says -----------------------------------------------------------------

    def _filled(self, values: Values) -> list[Any]:
        return [values.get(k, x) for k, x in enumerate(self.leaves)]

    def _function(self, values: Values) -> list[Any]:
        """Run the program, its gates that are not linear left out."""
        copies = [self._filled(values)]
        (out,), _ = self._declared.run(self._jaxpr, self._consts, copies)
        return [out[k] for k in self._outs]

    def _values(self) -> Values:
        return {k: self.leaves[k] for k in self.places}

    def _slope(
        self,
        mode: str,
        function: Function,
        values: Values,
        directions: Sequence[Values],
        cts: Any = None,
    ) -> list[Any]:
        """Return the directional derivatives, of what the cotangents weigh."""
        cts = self._cts if cts is None else cts
        if mode == "rev":
            out, pull = jax.vjp(function, values)
            cts = [jnp.asarray(ct, o.dtype) for ct, o in zip(cts, out, strict=True)]
            (grads,) = pull(cts)
            return [
                sum(_wide(jnp.sum(grads[k].conj() * v)) for k, v in direction.items())
                for direction in directions
            ]
        slopes = []
        for direction in directions:
            dots = {k: direction.get(k, jnp.zeros_like(x)) for k, x in values.items()}
            out = jax.jvp(function, (values,), (dots,))[1]
            pairs = zip(cts, out, strict=True)
            slopes.append(sum(_wide(jnp.sum(ct * dot)) for ct, dot in pairs))
        return slopes

    def _each(self, along: Callable[..., list[Any]]) -> dict[Direction, float]:
        """Return the derivative in each direction."""
        directions = [{k: v} for (k, _), v in self._directions.items()]
        try:
            slopes = jax.jit(along)(self._values(), directions)
        except TypeError as error:
            if "forward" not in str(error):
                raise
            rules = self._declared.reverse_only or ["a custom_vjp of JAX's own"]
            raise TypeError(
                beats(
                    f"{self.called}, modes=('fwd',)",
                    "a function with a forward derivative",
                    f"one with a reverse rule only: {quoted(rules)}",
                    'modes=("rev",)',
                )
            ) from error
        return dict(zip(self._directions, map(float, slopes), strict=True))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.result_type(float))


def _kink(found: Slope) -> str:
    if not found.is_at_kink:
        return ""
    return (
        f"\n  the point is at a kink: slope {found.left:.6g} on one side, "
        f"{found.right:.6g} on the other"
    )


def _along(rng: Any, leaf: jax.Array) -> Iterator[jax.Array]:
    """Yield directions: each entry if they are few, else a random one.

    An entry moves by about its size, and by that of the others if it is zero; a tiny
    one by less than the others, that may be at the border of a domain.
    """
    x = np.abs(np.asarray(leaf, np.float64))
    finite = x[np.isfinite(x) & (x > 0)]
    usual = float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 1.0
    own = np.minimum(np.sqrt(x * usual), 100 * x)
    reach = np.where(np.isfinite(x) & (x > 0), own, usual)
    if 0 < x.size <= _FEW:
        for k in range(x.size):
            one = np.zeros(x.size)
            one[k] = reach.flat[k]
            entry = jnp.asarray(one.reshape(x.shape), leaf.dtype)
            yield _jax.sharded_like(entry, leaf)
    else:
        every = jnp.asarray(rng.standard_normal(x.shape) * reach, leaf.dtype)
        yield _jax.sharded_like(every, leaf)


def _unit(rng: Any, aval: Any) -> jax.Array:
    numbers = jnp.asarray(rng.standard_normal(aval.shape), aval.dtype)
    return _jax.sharded_as(numbers, aval)
