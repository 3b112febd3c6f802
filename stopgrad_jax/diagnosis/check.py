"""Compare derivatives with differences, for functions with stops, gates and rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import nodes
from stopgrad_jax._engine.declared import Declared
from stopgrad_jax._engine.trace import Traced, Value, trace
from stopgrad_jax._errors import beats, function_name, quoted, type_of

P = ParamSpec("P")

_STEPS = {4: (3e-2, 1e-2, 3e-3, 1e-3), 8: (1e-3, 1e-4, 1e-5, 1e-6)}
_TOLERANCE = {4: 5e-3, 8: 1e-5}


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
      tol: the largest relative error, by default 5e-3 in float32 and 1e-5 in float64;
        what is lost by rounding in the differences is allowed for on top.
      allow: names of functions whose custom rule differs from them on purpose. The rule
        is followed there. ("with_backward" stands for all calls of that.) Every other
        custom_jvp, custom_vjp and `sg.with_backward` is compared with its own forward,
        but for those of JAX and of this library.

    Returns:
      A function of `fun`'s arguments: concrete arrays of float32 or float64 at leaves
      that carry a gradient; all others are left alone.

    Raises:
      AssertionError: a derivative is wrong; names the leaf or the function, and both
        numbers, and says so where the point is at a kink.
      ValueError: an unknown mode, order or name in `allow`; or a stop, gate or rule
        inside `shard_map`.
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
        AssertionError: check_gradients(sin): the rule of with_backward is not ...
    """
    called = f"check_gradients({function_name(fun)})"
    _require_options(order, modes, called)

    @functools.wraps(fun)
    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        traced = trace(fun, args, kwargs)
        places = dict(_places(traced, called))
        checked = _Checked(traced, places, tuple(allow), called, tol)
        checked.compare_rules()
        for mode in modes:
            checked.compare(mode)
        if order == 2:
            checked.compare_second()

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
        self._declared = Declared(allow, called)
        self._jaxpr, self._consts = traced.jaxpr, traced.consts
        outs = [v.aval for v in traced.jaxpr.outvars]
        self._outs = [k for k, a in enumerate(outs) if _jax.is_differentiable(a)]
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
        self._directions = {k: self._direction(rng, k) for k in places}
        size = min(self.leaves[k].dtype.itemsize for k in places)
        self._steps, self.tol = _STEPS[size], _TOLERANCE[size] if tol is None else tol
        self._eps = float(np.finfo(np.float32 if size == 4 else np.float64).eps)
        self._triple = jax.jit(self._run_triple)
        self._triple(self.leaves, self.leaves, self.leaves)  # meets every rule
        unknown = set(allow) - set(self._declared.rules)
        if unknown:
            raise ValueError(
                beats(
                    called,
                    "allow names functions with a custom rule that fun calls",
                    quoted(sorted(unknown)),
                    f"one of {quoted(self._declared.rules)}",
                )
            )

    def _direction(self, rng: Any, k: int) -> jax.Array:
        """Return a random direction of the leaf's own size."""
        x = np.asarray(self.leaves[k])
        size = np.sqrt(np.mean(np.square(x))) if x.size else 1.0
        size = size if np.isfinite(size) and size > 0 else 1.0
        return jnp.asarray(rng.standard_normal(x.shape) * size, x.dtype)

    def _run_triple(self, *copies: Any) -> Any:
        outs, reports = self._declared.run(self._jaxpr, self._consts, copies)
        return [[out[k] for k in self._outs] for out in outs], reports

    def _moved(self, moved: Iterable[int], h: float) -> list[Any]:
        leaves = list(self.leaves)
        for k in moved:
            leaves[k] = (
                leaves[k] + jnp.asarray(h, leaves[k].dtype) * self._directions[k]
            )
        return leaves

    def compare_rules(self) -> None:
        """Compare each custom rule with the differences of its own function."""
        best: dict[str, np.ndarray] = {}
        for moved in [list(self.places), *([k] for k in self.places)]:
            found: dict[str, list[np.ndarray]] = {}
            for h in self._steps:
                args = self.leaves, self._moved(moved, h), self._moved(moved, -h)
                for name, report in self._triple(*args)[1].items():
                    error, true, told = np.asarray(report, np.float64)
                    scaled = np.array([error, true / h, told / h])
                    found.setdefault(name, []).append(scaled)
            for name, reports in found.items():
                least = min(reports, key=lambda r: float(r[0]))
                if name not in best or best[name][0] < least[0]:
                    best[name] = least
        for name, (error, true, told) in best.items():
            if error > 2 * self.tol:
                place = self._declared.rules[name]
                at = f" ({place})" if place else ""
                raise AssertionError(
                    f"{self.called}: the rule of {name}{at} is not the derivative of "
                    f"its function: {true:.6g} by differences, {told:.6g} by the rule\n"
                    f'  write: allow=["{name}"], if it differs on purpose'
                )

    def compare(self, mode: str) -> None:
        """Compare first derivatives, leaf by leaf."""
        told = self._reverse() if mode == "rev" else self._forward()
        for k, path in self.places.items():
            differences = [self._difference(k, h) for h in self._steps]
            self._judge(path, float(told[k]), differences, mode)

    def _difference(self, k: int, h: float) -> tuple[float, float, float, float]:
        """Return the central difference, its noise, and those of either side."""
        args = self.leaves, self._moved([k], h), self._moved([k], -h)
        sides = [self._dot(out) for out in self._triple(*args)[0]]
        (base, size), (plus, _), (minus, _) = sides
        noise = 8 * self._eps * size / h
        return (plus - minus) / (2 * h), noise, (base - minus) / h, (plus - base) / h

    def _dot(self, outs: Sequence[Any]) -> tuple[float, float]:
        terms = [
            np.asarray(ct, np.float64) * np.asarray(out, np.float64)
            for ct, out in zip(self._cts, outs, strict=True)
        ]
        size = float(sum(np.abs(t).sum() for t in terms))
        return float(sum(t.sum() for t in terms)), size

    def _judge(
        self,
        path: str,
        told: float,
        found: Sequence[tuple[float, float, float, float]],
        how: str,
    ) -> None:
        best, error = found[0], np.inf
        for difference in found:
            value, noise, *_ = difference
            scale = self.tol * max(abs(value), abs(told)) + noise + self._eps
            # nan is never below anything
            if not abs(value - told) > scale and np.isfinite(value - told):
                return
            if abs(value - told) / scale < error:
                best, error = difference, abs(value - told) / scale
        value, noise, left, right = best
        kink = abs(left - right) > 0.1 * max(abs(left), abs(right)) + 2 * noise
        hint = (
            f"\n  the point is at a kink: slope {left:.6g} on one side, {right:.6g} on "
            "the other"
            if kink
            else ""
        )
        raise AssertionError(
            f"{self.called}: wrong derivative by {path} ({how}), along a random "
            f"direction: {value:.6g} by differences, {told:.6g} by JAX{hint}"
        )

    # What JAX says -----------------------------------------------------------------

    def _function(self, values: dict[int, Any]) -> list[Any]:
        """Run the program, its gates that are not linear left out."""
        leaves = [values.get(k, x) for k, x in enumerate(self.leaves)]
        (out,), _ = self._declared.run(self._jaxpr, self._consts, [leaves])
        return [out[k] for k in self._outs]

    def _values(self) -> dict[int, Any]:
        return {k: self.leaves[k] for k in self.places}

    def _reverse(self) -> dict[int, Any]:
        def slopes(values: dict[int, Any]) -> dict[int, Any]:
            (grads,) = jax.vjp(self._function, values)[1](self._cts)
            return {k: jnp.vdot(g, self._directions[k]) for k, g in grads.items()}

        return jax.jit(slopes)(self._values())

    def _forward(self) -> dict[int, Any]:
        def slope(values: dict[int, Any], k: int) -> Any:
            dots = {j: jnp.zeros_like(x) for j, x in values.items()}
            dots[k] = self._directions[k]
            out = jax.jvp(self._function, (values,), (dots,))[1]
            return sum(jnp.vdot(c, o) for c, o in zip(self._cts, out, strict=True))

        try:
            jitted = jax.jit(slope, static_argnums=1)
            return {k: jitted(self._values(), k) for k in self.places}
        except TypeError as error:
            rules = list(self._declared.rules)
            raise TypeError(
                beats(
                    f"{self.called}, modes=('fwd',)",
                    "a function with a forward derivative",
                    f"one with a reverse rule only: {quoted(rules)}",
                    'modes=("rev",)',
                )
            ) from error

    def compare_second(self) -> None:
        """Compare the derivative of a directional derivative, leaf by leaf."""

        def along(function: Callable[[dict[int, Any]], Any], values: Any) -> Any:
            (grads,) = jax.vjp(function, values)[1](self._cts)
            return sum(jnp.vdot(g, self._directions[k]) for k, g in grads.items())

        def declared(values: dict[int, Any]) -> list[Any]:
            leaves = [values.get(k, x) for k, x in enumerate(self.leaves)]
            copies = [self.leaves, leaves]
            outs, _ = self._declared.run(self._jaxpr, self._consts, copies)
            return [outs[1][k] for k in self._outs]

        told = jax.jit(jax.grad(lambda values: along(self._function, values)))
        told = told(self._values())
        slope = jax.jit(functools.partial(along, declared))
        base = float(slope(self._values()))
        for k, path in self.places.items():
            found = []
            for h in self._steps:
                plus, minus = (
                    float(slope(self._values() | {k: self._moved([k], s)[k]}))
                    for s in (h, -h)
                )
                noise = 8 * self._eps * abs(base) / h
                sides = (base - minus) / h, (plus - base) / h
                found.append(((plus - minus) / (2 * h), noise, *sides))
            value = float(jnp.vdot(told[k], self._directions[k]))
            self._judge(path, value, found, "second order")


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
        known = not _jax.is_traced(leaf) and isinstance(leaf, jax.Array)
        if not known or dtype.kind != "f" or dtype.itemsize not in _STEPS:
            raise TypeError(
                beats(
                    called,
                    "known arrays of float32 or float64",
                    f'a {"" if known else "traced "}{type_of(leaf)} at "{path}"',
                    "x.astype(jnp.float32): narrow floats have no useful differences"
                    if known
                    else "the call outside of jax.jit",
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
