"""Compare derivatives with differences, for functions with stops, gates and rules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import nodes
from stopgrad_jax._engine.declared import Declared
from stopgrad_jax._engine.slope import Difference, Slope, slope
from stopgrad_jax._engine.trace import Traced, Value, trace
from stopgrad_jax._errors import beats, function_name, quoted, type_of

P = ParamSpec("P")

# By the size of the dtype. Powers of two: then a distance costs no rounding of its own.
_DISTANCES = {
    4: tuple(2.0**-k for k in range(4, 13)),
    8: tuple(2.0**-k for k in range(6, 25, 2)),
}
_TOLERANCE = {4: 1e-3, 8: 1e-6}
_FEW = 8  # entries of a leaf that are moved one by one

Direction = tuple[int, int]  # which leaf, and which of its directions
Values = dict[int, Any]  # of the leaves to differentiate by
Function = Callable[[Values], list[Any]]


def check_gradients(
    fun: Callable[P, Any],
    *,
    order: int = 1,
    modes: Sequence[str] = ("rev",),
    tol: float | None = None,
    allow: Collection[str] = (),
) -> Callable[P, None]:
    """Check a function's derivatives by finite differences that know what is declared.

    Ordinary checkers fail at every stop and every straight-through. This one takes the
    differences of what the function *declares*: a stopped value is held fixed, a
    straight-through value moves as its surrogate, a linear gate by its factor. Gates
    that are not linear (clip, norm, transform, nonfinite) are left out on both sides.

    Forward: `fun` is run near its arguments.
    Backward: `fun`'s, in each of the `modes`.

    Args:
      fun: any function that JAX can trace.
      order: 1; or 2 to check the derivative of the gradient as well.
      modes: "rev" (`jax.vjp`) and "fwd" (`jax.jvp`).
      tol: the largest relative error, by default 1e-3 in float32 and 1e-6 in float64;
        what the differences themselves are unsure of is allowed for on top.
      allow: names of functions whose custom rule differs from them on purpose. The rule
        is followed there. ("with_backward" stands for all calls of that.) Every other
        custom_jvp, custom_vjp and `sg.with_backward` is compared with its own forward,
        but for those of JAX and of this library.

    Returns:
      A function of `fun`'s arguments: concrete arrays of float32 or float64 at leaves
      that carry a gradient; all others are left alone.

    Raises:
      AssertionError: a derivative is wrong; names the leaf or the function, and both
        numbers, and says so where the point is at a kink, or where the differences
        settle nothing.
      ValueError: an unknown mode, order or name in `allow`.
      TypeError: there is nothing to differentiate, or it is traced, complex or narrow;
        or forward mode of a function that has none.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.straight_through(jnp.round)(x) * jnp.sin(x))
        >>> sg.check_gradients(f, order=2)(jnp.array([0.3, 1.7]))
        >>> wrong = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.sin(x),))
        >>> sg.check_gradients(wrong)(0.5)
        Traceback (most recent call last):
            ...
        AssertionError: check_gradients(sin): the rule of with_backward(sin)...
    """
    called = f"check_gradients({function_name(fun)})"
    _require_options(order, modes, called)

    @functools.wraps(fun)
    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        traced = trace(fun, args, kwargs)
        places = dict(_places(traced, called))
        _require_known([*traced.leaves, *traced.consts], called)
        names = (allow,) if isinstance(allow, str) else tuple(allow)
        checked = _Checked(traced, places, names, called, tol)
        checked.compare_rules()
        for mode in modes:
            checked.compare(mode)
            if order == 2:
                checked.compare_second(mode)

    return check


class _Checked:
    """One traced function at one point."""

    def __init__(
        self,
        traced: Traced,
        places: dict[int, str],
        allow: tuple[str, ...],
        called: str,
        tol: float | None,
    ) -> None:
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
        self._distances = _DISTANCES[size]
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
                sum(_wide(jnp.vdot(grads[k], v)) for k, v in direction.items())
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
            yield jnp.asarray(one.reshape(x.shape), leaf.dtype)
    else:
        yield jnp.asarray(rng.standard_normal(x.shape) * reach, leaf.dtype)


def _require_known(values: Sequence[Any], called: str) -> None:
    for x in filter(_jax.is_traced, values):
        raise TypeError(
            beats(
                called,
                "arrays whose values are known: the function is run",
                f"a traced {type_of(x)}",
                "the call outside of jax.jit: sg.check_gradients(jax.jit(fun))(*args)",
            )
        )


def _unit(rng: Any, aval: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal(aval.shape), aval.dtype)


def _places(traced: Traced, called: str) -> Iterator[tuple[int, str]]:
    """Number and address of each leaf to differentiate by."""
    found = False
    positional = {str(k): tree for k, tree in enumerate(traced.positional)}
    seen: dict[int, str] = {}
    for root, tree in (positional | dict(traced.arguments)).items():
        for path, place in nodes(tree, root):
            if isinstance(place, Value):
                seen[place.index] = path
    for k, path in sorted(seen.items()):
        leaf = traced.leaves[k]
        if not _jax.carries_gradient(leaf):
            continue
        found = True
        dtype = jnp.dtype(leaf.dtype)
        known = isinstance(leaf, jax.Array)
        if not known or dtype.kind != "f" or dtype.itemsize not in _DISTANCES:
            raise TypeError(
                beats(
                    called,
                    "known arrays of float32 or float64",
                    f'a {"" if known else "shape only, "}{type_of(leaf)} at "{path}"',
                    "fun of real arrays, as lambda re, im: fun(re + 1j * im)"
                    if dtype.kind == "c"
                    else "x.astype(jnp.float32): narrow floats have no useful "
                    "differences"
                    if known
                    else "an array",
                )
            )
        yield k, path
    if not found:
        raise TypeError(
            beats(
                called,
                "an argument that carries a gradient",
                quoted(seen.values()),
                "an argument of floats",
            )
        )


def _require_options(order: int, modes: Sequence[str], called: str) -> None:
    if order not in (1, 2):
        raise ValueError(beats(called, "order is 1 or 2", f"{order!r}", "order=2"))
    wrong = [m for m in modes if m not in ("rev", "fwd")]
    if isinstance(modes, str) or wrong or not modes:
        expected = 'modes are "rev", "fwd" or both'
        instead = 'modes=("rev", "fwd")'
        raise ValueError(beats(called, expected, f"{modes!r}", instead))
