"""Differentiate some places of a program by others, with some held constant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._address import Address
from stopgrad_jax._errors import beats, has_beats, shortened, wrong
from stopgrad_jax._gate.summaries import channel
from stopgrad_jax._jax.errors import is_of_a_closure
from stopgrad_jax._program.lookup import LookedUp, look_up
from stopgrad_jax._program.rewrite import Actions, Rewriter
from stopgrad_jax._program.search import Found, live
from stopgrad_jax._program.trace import Place
from stopgrad_jax._source.labels import Labels

from .absent import may_be_nonzero
from .closures import holds_closure
from .computed import all_that_flows
from .cuts import Analysis
from .derivative_rules import Rules
from .graph import Operation
from .reach import Moves, Reach, read, union
from .unfold import unfold


class Differentiation:
    """Which xs reach which ys, and the gradients themselves.

    Args:
      program: a traced function, looked up.
      xs: the places to differentiate by; those that carry no gradient are left out.
      ys: the places that are differentiated.
      stops: addresses held constant.
      called: for error messages.
      sums: the gradients of points are summed up where they are made: see
        `_gate/summaries.py`.
    """

    def __init__(
        self,
        program: LookedUp,
        xs: set[Place],
        ys: Iterable[Place],
        stops: Sequence[Address],
        called: str,
        sums: bool = False,
    ) -> None:
        self._program, self._called, self._sums = program, called, sums
        self._xs = sorted(x for x in xs if _jax.is_differentiable(program.types[x]))
        self._held = program.targets_of(stops)
        # Only what reaches what, by summaries; the graph with the ways between, which
        # takes longer, is made where a zero is to be explained: see `_analysis`.
        rules, plan, jaxpr = Rules(), program.plan, program.traced.jaxpr
        moves = Moves(rules.moving, self._is_held)
        reach = Reach(rules, self._is_held, moves, rules.by_pattern)
        sources = self._sources(self._xs)
        needed = needed_for(program, ys)
        env, found = reach.follow(jaxpr, plan, sources, sources, needed)
        outputs = [read(env, atom) for atom in jaxpr.outvars]
        inputs = [read(env, var) for var in jaxpr.invars]
        self._bits = {"argument": inputs, "output": outputs, "point": found}
        self._all_ys = list(dict.fromkeys(ys))

    @functools.cached_property
    def connected(self) -> list[Place]:
        """Those xs that any of the ys depends on."""
        reached = union(map(self._reached, self._all_ys))
        return [x for k, x in enumerate(self._xs) if reached >> k & 1]

    def why(self, x: Place) -> str:
        """Say why no y is connected to x."""
        if not _jax.is_differentiable(self._program.types[x]):
            return f"{self._program.types[x].dtype} carries no gradient"
        bit = 1 << self._xs.index(x)
        cuts = [cut for cut in self._analysis.cuts if cut.lost & bit]
        found = [f"{c.told} ({c.places or 'no source'})" for c in cuts]
        return ", ".join(dict.fromkeys(found)) or "no y is computed from it"

    @functools.cached_property
    def _analysis(self) -> Analysis:
        """What reaches what, with the way between: once for all xs."""
        plan, jaxpr = self._program.plan, self._program.traced.jaxpr
        sources = self._sources(self._xs)
        needed = needed_for(self._program, self._all_ys)
        graph = unfold(jaxpr, Labels(), plan, self._is_held, sources, needed)
        values = {
            "argument": graph.inputs,
            "output": graph.outputs,
            "point": graph.found,
        }

        def at(place: Place) -> list[int]:
            value = values[place.kind][place.index]
            return [] if value is None else [value]

        ends = [v for y in self._all_ys for v in at(y)]
        return Analysis(graph, [at(x) for x in self._xs], ends)

    def gradients(
        self, pairs: Sequence[tuple[Place, Any]], want_value: bool
    ) -> tuple[list[Any], dict[Place, Any]]:
        """Return (the program's outputs if wanted, {x: gradient} for connected xs).

        `pairs` holds a y and its cotangent each.
        """
        pairs = [(y, ct) for y, ct in pairs if self._reached(y)]
        ys = [y for y, _ in pairs]
        xs = self.connected
        evaluate = functools.partial(self._evaluate, ys, xs, want_value)
        if not xs:
            return (evaluate([], None)[1] if want_value else []), {}
        values = [self._start(x) for x in xs]
        try:
            if self._held:
                # What is held is constant for what differentiates by this number, too:
                # a `jax.grad` around this call does not, and differentiates through.
                token = jnp.zeros((), jnp.float32)
                _, pullback, out = jax.vjp(evaluate, values, token, has_aux=True)
            else:
                rest = functools.partial(evaluate, token=None)
                _, pullback, out = jax.vjp(rest, values, has_aux=True)
            grads = pullback([ct for _, ct in pairs])[0]
        except Exception as error:
            self._explain(error)
            raise
        return out, dict(zip(xs, grads, strict=True))

    def _explain(self, error: Exception) -> None:
        """Say where a derivative failed that JAX raises at, with the user's line."""
        ops = self._analysis.refusing((1 << len(self._xs)) - 1)
        places = {f"{op.name} ({op.spot.place})" if op.spot else op.name for op in ops}
        loops = [op for op in ops if op.join]
        if is_of_a_closure(error):
            raise TypeError(inside_a_closure(self._called)) from error
        if loops and _jax.is_no_reverse(error):
            raise wrong(
                ValueError,
                self._called,
                "a known number of steps: reverse mode has to store each",
                f"a loop whose number is known only when it runs: {_listed(loops)}",
                "jax.lax.scan, or jax.lax.fori_loop with Python integers",
            ) from error
        if places and not has_beats(error):
            note = f"{self._called}: JAX raised this at {', '.join(sorted(places))}"
            error.add_note(note)

    def _start(self, x: Place) -> Any:
        """Return what is differentiated by for a place."""
        program = self._program
        if x.kind == "argument":
            return program.traced.leaves[x.index]
        if self._sums and x.kind == "point":
            found = program.plan.found[x.index]
            return channel(found.aval, [copies.count for copies in found.copies])
        return _jax.zeros(program.types[x])

    def _evaluate(
        self,
        ys: Sequence[Place],
        xs: Sequence[Place],
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
        if self._closes_over and plan.found:
            raise TypeError(inside_a_closure(self._called))
        if self._closes_over:  # nothing is done to values inside: call it anew
            out, captured = traced.run(*leaves), []
        else:
            actions = Actions(
                holds=self._held, captures=frozenset(captures), sums=self._sums
            )
            sinks = _sinks(self._program, ys)
            if want_value:
                n = len(traced.jaxpr.outvars)
                sinks[:n] = [True] * n
            eqns, _ = live(traced.jaxpr, plan, sinks)
            run = Rewriter(actions).run
            out, captured = run(plan, leaves, perturbations, token, eqns)
        places = {"argument": leaves, "output": out, "point": captured}
        return [places[y.kind][y.index] for y in ys], out if want_value else []

    @functools.cached_property
    def _closes_over(self) -> bool:
        """Whether a custom rule cannot be called once the function's trace has ended.

        `jax.grad` differentiates while the function runs, and its rule may close over
        what the function was given.
        """
        return holds_closure(self._program.traced.jaxpr)

    def _is_held(self, found: Found) -> bool:
        return not self._held.isdisjoint(found.targets)

    def _reached(self, y: Place) -> int:
        return self._bits[y.kind][y.index]

    def _sources(self, xs: Sequence[Place]) -> list[int]:
        number = {x: 1 << k for k, x in enumerate(xs)}
        return [number.get(place, 0) for place in places_of(self._program)]


def inside_a_closure(called: str) -> str:
    """Say why values beside a rule that closes over one cannot be got at."""
    return beats(
        called,
        "custom rules read the arguments of their own function, where values inside "
        "or what a rule closes over are differentiated by",
        "one that closes over a value of the function around it",
        "sg.with_backward(fun, backward)(x, value): an argument there, for which "
        "backward returns a cotangent or None",
    )


def _listed(ops: Sequence[Operation]) -> str:
    return ", ".join(dict.fromkeys(op.spot.place if op.spot else op.name for op in ops))


def _sinks(program: LookedUp, ys: Iterable[Place]) -> list[bool]:
    """Flag the ys among the results and the found values of a program."""
    asked = set(ys)
    ends = [Place("output", k) for k in range(len(program.traced.jaxpr.outvars))]
    ends += [Place("point", k) for k in range(len(program.plan.found))]
    return [place in asked for place in ends]


def needed_for(program: LookedUp, ys: Iterable[Place]) -> list[int]:
    """Return the numbers of the equations that the ys are computed by.

    A rule that is not on a way to them is not asked: it may not be able to run.
    """
    jaxpr = program.traced.jaxpr
    eqns, _ = live(jaxpr, program.plan, _sinks(program, ys))
    needed = set(map(id, eqns))
    return [k for k, eqn in enumerate(jaxpr.eqns) if id(eqn) in needed]


def places_of(program: LookedUp) -> list[Place]:
    """All places that can be differentiated by: arguments, then found values."""
    arguments = [Place("argument", k) for k in range(len(program.traced.leaves))]
    return arguments + [Place("point", k) for k in range(len(program.plan.found))]


def try_gradient(
    program: LookedUp, xs: Sequence[Place], ys: Sequence[Place], called: str
) -> tuple[bool, str]:
    """Differentiate some places by others, abstractly, as `jax.grad` would.

    Returns whether any gradient is more than a zero, and what JAX raised.
    """
    traced = program.traced.again()
    program = look_up(traced, program.matched, called)

    inside = any(place.kind == "point" for place in (*xs, *ys))

    def gradients(leaves: Any, cts: Any) -> Any:
        # From arguments to results the function is called as it is, so that what
        # raises here raises in `jax.grad`, and nothing else does.
        if not inside:

            def run(*values: Any) -> list[Any]:
                moved = list(leaves)
                for x, value in zip(xs, values, strict=True):
                    moved[x.index] = value
                out = traced.run(*moved)
                return [out[y.index] for y in ys]

            return jax.vjp(run, *(leaves[x.index] for x in xs))[1](list(cts))
        filled = dataclasses.replace(traced, leaves=leaves)
        here = dataclasses.replace(program, traced=filled)
        pairs = list(zip(ys, cts, strict=True))
        asked = Differentiation(here, {*xs}, ys, (), called)
        return list(asked.gradients(pairs, False)[1].values())

    cts = [_jax.as_argument(program.types[y]) for y in ys]
    try:
        jaxpr, consts = _jax.opened(jax.make_jaxpr(gradients)(traced.leaves, cts))
        # A traced value that is none of the program's own: a rule has closed over it.
        outer = set(map(id, (*traced.consts, *traced.leaves)))
        if any(_jax.is_traced(x) and id(x) not in outer for x in consts):
            return False, _words.CLOSED_OVER
        if any(_jax.is_traced(x) and id(x) not in outer for x in _jax.held(jaxpr)):
            return False, _words.CLOSED_OVER_INSIDE
    except Exception as error:  # whatever the rule on the way raises
        return False, f"{type(error).__name__}: {shortened(error, 160)}"
    first = len(jaxpr.invars) - len(cts)
    if any(bits >> first for bits in all_that_flows(jaxpr)):
        return True, ""
    return may_be_nonzero(jaxpr, consts), ""  # a rule may return more than comes
