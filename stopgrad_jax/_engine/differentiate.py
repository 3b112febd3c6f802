"""Differentiate some places of a program by others, with some held constant."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Address

from .causes import Analysis
from .connect import Reach, read
from .dependence import Rules
from .labels import Labels
from .reduced import channel
from .rewrite import Actions, Rewriter
from .select import Program
from .trace import Value
from .unfold import unfold
from .walk import Found, live


class Differentiation:
    """Which xs reach which ys, and the gradients themselves.

    Args:
      program: a traced function, looked up.
      xs: the places to differentiate by; those that carry no gradient are left out.
      stops: addresses held constant.
      sums: the gradients of points are summed up where they are made (`reduced.py`).
    """

    def __init__(
        self,
        program: Program,
        xs: set[Value],
        stops: Sequence[Address],
        sums: bool = False,
    ) -> None:
        self._program, self._sums = program, sums
        self._xs = sorted(x for x in xs if _jax.is_differentiable(program.types[x]))
        self._held = program.targets_of(stops)
        self._reach = Reach(Rules(), self._is_held)
        plan, jaxpr = program.plan, program.traced.jaxpr
        env, found = self._reach.follow(jaxpr, plan, self._sources(self._xs))
        outputs = [read(env, atom) for atom in jaxpr.outvars]
        inputs = [read(env, var) for var in jaxpr.invars]
        self._bits = {"argument": inputs, "output": outputs, "point": found}

    def connected(self, ys: Sequence[Value]) -> list[Value]:
        """Those xs that any of the ys depends on."""
        reached = functools.reduce(int.__or__, map(self._reached, ys), 0)
        return [x for k, x in enumerate(self._xs) if reached >> k & 1]

    def why(self, x: Value, ys: Sequence[Value]) -> str:
        """Say why no y is connected to x."""
        plan, jaxpr = self._program.plan, self._program.traced.jaxpr
        if not _jax.is_differentiable(self._program.types[x]):
            return f"{self._program.types[x].dtype} carries no gradient"
        graph = unfold(jaxpr, Labels(), plan, self._is_held)
        values = {
            "argument": graph.inputs,
            "output": graph.outputs,
            "point": graph.found,
        }

        def at(place: Value) -> list[int]:
            value = values[place.kind][place.index]
            return [] if value is None else [value]

        analysis = Analysis(graph, [at(x)], [v for y in ys for v in at(y)])
        found = [f"{c.words} ({c.place or 'no source'})" for c in analysis.cuts]
        return ", ".join(dict.fromkeys(found)) or "no y is computed from it"

    def gradients(
        self, pairs: Sequence[tuple[Value, Any]], want_value: bool
    ) -> tuple[list[Any], dict[Value, Any]]:
        """Return (the program's outputs if wanted, {x: gradient} for connected xs).

        `pairs` holds a y and its cotangent each.
        """
        pairs = [(y, ct) for y, ct in pairs if self._reached(y)]
        ys = [y for y, _ in pairs]
        xs = self.connected(ys)
        evaluate = functools.partial(self._evaluate, ys, xs, want_value)
        if not xs:
            return (evaluate([], None)[1] if want_value else []), {}
        values = [self._start(x) for x in xs]
        if self._held:
            token = jnp.zeros((), jnp.float32)
            _, pullback, out = jax.vjp(evaluate, values, token, has_aux=True)
        else:
            rest = functools.partial(evaluate, token=None)
            _, pullback, out = jax.vjp(rest, values, has_aux=True)
        return out, dict(zip(xs, pullback([ct for _, ct in pairs])[0], strict=True))

    def _start(self, x: Value) -> Any:
        """Return what is differentiated by for a place."""
        program = self._program
        if x.kind == "argument":
            return program.traced.leaves[x.index]
        if self._sums and x.kind == "point":
            found = program.plan.found[x.index]
            return channel(found)
        return _jax.zeros(program.types[x])

    def _evaluate(
        self,
        ys: Sequence[Value],
        xs: Sequence[Value],
        want_value: bool,
        values: Sequence[Any],
        token: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Run the program with `values` at the xs; return (ys, outputs)."""
        plan, traced = self._program.plan, self._program.traced
        leaves: list[Any] = list(traced.leaves)
        perturbations: list[Any] = [None] * len(plan.found)
        for x, value in zip(xs, values, strict=True):
            (leaves if x.kind == "argument" else perturbations)[x.index] = value
        captures = {
            t for y in ys if y.kind == "point" for t in plan.found[y.index].targets
        }
        actions = Actions(
            holds=self._held, captures=frozenset(captures), sums=self._sums
        )
        sinks = self._sinks(ys)
        if want_value:
            n = len(traced.jaxpr.outvars)
            sinks[:n] = [True] * n
        eqns, _ = live(traced.jaxpr, plan, sinks)
        run = Rewriter(actions).run
        out, captured = run(plan, leaves, perturbations, token, eqns)
        places = {"argument": leaves, "output": out, "point": captured}
        return [places[y.kind][y.index] for y in ys], out if want_value else []

    def _is_held(self, found: Found) -> bool:
        return not self._held.isdisjoint(found.targets)

    def _reached(self, y: Value) -> int:
        return self._bits[y.kind][y.index]

    def _sources(self, xs: Sequence[Value]) -> list[int]:
        number = {x: 1 << k for k, x in enumerate(xs)}
        places = [Value("argument", k) for k in range(len(self._program.traced.leaves))]
        places += [Value("point", k) for k in range(len(self._program.plan.found))]
        return [number.get(place, 0) for place in places]

    def _sinks(self, ys: Sequence[Value]) -> list[bool]:
        asked = set(ys)
        count = len(self._program.traced.jaxpr.outvars)
        places = [Value("output", k) for k in range(count)]
        places += [Value("point", k) for k in range(len(self._program.plan.found))]
        return [place in asked for place in places]
