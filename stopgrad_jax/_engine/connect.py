"""Which value reaches which through derivatives, decided without running anything.

A value is *connected* to a later one if a derivative rule on every step of some way
between them hands the tangent on. Each jaxpr is summed up once: which of its inputs,
and which values found inside it, is each of its results connected to? Sets of them
are the bits of Python integers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax

import stopgrad_jax._jax as _jax

from .nested import Nested, nested
from .signature import signature
from .walk import Found, Match, Plan

Bits = int
# equation -> for each result, the operands (as bits) whose tangent it depends on
Dependence = Callable[[Any], Sequence[Bits]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the results of a jaxpr, and the values found in it, are connected to.

    Bit i is input i; with n inputs, bit n + k is the k-th found value.
    """

    results: Sequence[Bits]
    found: Sequence[Bits]


class Reach:
    """Sums up jaxprs; `held(found)` tells which found values pass nothing on.

    A value found at an equation is connected to itself, and to what it is computed
    from unless it is held.
    """

    def __init__(
        self,
        dependence: Dependence | None = None,
        held: Callable[[Found], bool] = lambda found: False,
    ) -> None:
        self._dependence = dependence or Rules()
        self._held = held
        self._summaries: dict[Any, Summary] = {}

    def summary(self, jaxpr: Any, plan: Plan | None = None) -> Summary:
        """Sum up a jaxpr, with what the plan found in it."""
        key = (id(jaxpr), id(plan))
        if key not in self._summaries:
            n = len(jaxpr.invars)
            sources = [1 << k for k in range(n + (len(plan.found) if plan else 0))]
            env, found = self.follow(jaxpr, plan, sources)
            results = [read(env, atom) for atom in jaxpr.outvars]
            self._summaries[key] = Summary(results, found)
        return self._summaries[key]

    def follow(
        self, jaxpr: Any, plan: Plan | None, sources: Sequence[Bits]
    ) -> tuple[dict[Any, Bits], list[Bits]]:
        """Return the bits of every variable and of every found value.

        `sources` holds the bits of each input, then those of each found value.
        """
        env = dict(zip(jaxpr.invars, sources, strict=False))
        matches = {m.index: m for m in plan.matches} if plan else {}
        found: list[Bits] = []
        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(env, atom) for atom in eqn.invars]
            match = matches.get(index)
            if any(_jax.is_ref(atom.aval) for atom in eqn.invars):
                start = len(jaxpr.invars) + len(found)
                count = len(match.inside) + len(match.own) if match else 0
                bits = _union([*operands, *sources[start : start + count]])
                found += [bits] * count
                env.update((v, bits) for v in eqn.outvars)
                # What is written to a reference may be read from it anywhere later.
                refs = [atom for atom in eqn.invars if _jax.is_ref(atom.aval)]
                env.update((ref, bits) for ref in refs)
                continue
            if match is None:
                if any(operands):
                    env.update(
                        zip(eqn.outvars, self.through(eqn, operands), strict=True)
                    )
                continue
            start = len(jaxpr.invars) + len(found)
            mine = sources[start : start + len(match.inside) + len(match.own)]
            results, inside = self._matched(match, operands, mine)
            env.update(zip(eqn.outvars, results, strict=True))
            found += inside
        return env, found

    def through(self, eqn: Any, operands: Sequence[Bits]) -> list[Bits]:
        """Bits of an equation's results, from those of its operands."""
        inner = nested(eqn)
        if inner is None or inner.rule:
            return [_apply(bits, operands) for bits in self._dependence(eqn)]
        return self._nested(eqn, inner, (None,) * len(inner.bodies), operands, ())[0]

    def _matched(
        self, match: Match, operands: Sequence[Bits], sources: Sequence[Bits]
    ) -> tuple[list[Bits], list[Bits]]:
        inner, split = nested(match.eqn), len(match.inside)
        if inner is None or inner.rule or not match.plans:
            results, found = self.through(match.eqn, operands), [0] * split
        else:
            plans, inside = match.plans, sources[:split]
            results, found = self._nested(match.eqn, inner, plans, operands, inside)
        for k, (own, source) in enumerate(zip(match.own, sources[split:], strict=True)):
            results[k] = source | (0 if self._held(own) else results[k])
            found.append(results[k])
        return results, found

    def _nested(
        self,
        eqn: Any,
        inner: Nested,
        plans: Sequence[Plan | None],
        operands: Sequence[Bits],
        sources: Sequence[Bits],
    ) -> tuple[list[Bits], list[Bits]]:
        results, found = [0] * len(eqn.outvars), list[Bits]()
        never = inner.dynamic or eqn.params.get("length") == 0  # may run no round
        for body, plan in zip(inner.bodies, plans, strict=True):
            summary = self.summary(body.jaxpr, plan)
            count = len(plan.found) if plan else 0
            mine, sources = list(sources[:count]), sources[count:]
            inputs = [operands[k] for k in body.operands]
            changed = True
            while changed:
                changed = False
                for out, back in body.feedback:
                    bits = inputs[back] | _apply(summary.results[out], inputs + mine)
                    changed |= bits != inputs[back]
                    inputs[back] = bits
            for k, bits in zip(body.results, summary.results, strict=True):
                if k is not None:
                    results[k] |= _apply(bits, inputs + mine)
            for out, back in body.feedback if never else ():
                if (k := body.results[out]) is not None:
                    results[k] |= inputs[back]
            found += [_apply(bits, inputs + mine) for bits in summary.found]
        carries = [_jax.is_differentiable(v.aval) for v in eqn.outvars]
        return [b if c else 0 for b, c in zip(results, carries, strict=True)], found


def read(env: dict[Any, Bits], atom: Any) -> Bits:
    """Bits of a variable; a literal or a constant has none."""
    return 0 if isinstance(atom, _jax.Literal) else env.get(atom, 0)


def _union(sources: Iterable[Bits]) -> Bits:
    return functools.reduce(int.__or__, sources, 0)


def _apply(bits: Bits, sources: Sequence[Bits]) -> Bits:
    out = 0
    while bits:
        low = bits & -bits
        out |= sources[low.bit_length() - 1]
        bits ^= low
    return out


class Rules:
    """Asks JAX's own derivative rules which operands a result depends on.

    An equation is differentiated abstractly, once for each signature, and what the
    tangents of its results are computed from is read off that program. So there is
    no table of primitives here, and a rule that changes with JAX changes with it.
    """

    _KEEP = 4096
    _known: ClassVar[dict[Any, Sequence[Bits]]] = {}

    def __init__(self) -> None:
        self._here: dict[Any, Sequence[Bits]] = {}

    def __call__(self, eqn: Any) -> Sequence[Bits]:
        """Return, for each result, the operands its tangent depends on."""
        # Keys that hold a user's functions or programs live as long as this call.
        cache = self._here if _jax.inner_jaxprs(eqn) else self._known
        key = signature(eqn, literals=False)  # a rule cannot see their values
        if key not in cache:
            if len(cache) >= self._KEEP:
                cache.clear()
            cache[key] = _ask(eqn)
        return cache[key]


def _ask(eqn: Any) -> Sequence[Bits]:
    moved = [
        k
        for k, atom in enumerate(eqn.invars)
        if not isinstance(atom, _jax.Literal) and _jax.is_differentiable(atom.aval)
    ]
    results = [k for k, v in enumerate(eqn.outvars) if _jax.is_differentiable(v.aval)]
    if not moved or not results:
        return [0] * len(eqn.outvars)
    for ask in (_ask_forward, _ask_reverse, _ask_each):
        try:
            return ask(eqn, moved, results)
        except Exception:  # a rule may raise whatever it likes
            continue
    # No rule that works here: JAX will say so if it is ever needed.
    everything = sum(1 << k for k in moved)
    return [everything if k in results else 0 for k in range(len(eqn.outvars))]


def _ask_forward(eqn: Any, moved: list[int], results: list[int]) -> list[Bits]:
    def tangents(operands: Any, moves: Any) -> Any:
        primals = tuple(operands[k] for k in moved)
        return jax.jvp(_restricted(eqn, operands, moved, results), primals, moves)[1]

    avals = [_jax.shape_of(atom.aval) for atom in eqn.invars]
    moves = tuple(avals[k] for k in moved)
    summary = _flow(tangents, avals, moves)
    table = [0] * len(eqn.outvars)
    for k, bits in zip(results, summary, strict=True):
        table[k] = sum(1 << i for j, i in enumerate(moved) if bits >> j & 1)
    return table


def _ask_each(eqn: Any, moved: list[int], results: list[int]) -> list[Bits]:
    """Ask operand by operand: a rule may refuse some of them (with_backward)."""
    out = [0] * len(eqn.outvars)
    for k in moved:
        try:
            asked = _ask_forward(eqn, [k], results)
        except Exception:
            asked = [1 << k if j in results else 0 for j in range(len(out))]
        out = [old | new for old, new in zip(out, asked, strict=True)]
    return out


def _ask_reverse(eqn: Any, moved: list[int], results: list[int]) -> list[Bits]:
    def cotangents(operands: Any, moves: Any) -> Any:
        primals = [operands[k] for k in moved]
        function = _restricted(eqn, operands, moved, results)
        return jax.vjp(function, *primals)[1](list(moves))

    avals = [_jax.shape_of(atom.aval) for atom in eqn.invars]
    moves = tuple(_jax.shape_of(eqn.outvars[k].aval) for k in results)
    summary = _flow(cotangents, avals, moves)
    table = [0] * len(eqn.outvars)
    for i, bits in zip(moved, summary, strict=True):
        for j, k in enumerate(results):
            table[k] |= (bits >> j & 1) << i
    return table


def _restricted(
    eqn: Any, operands: Sequence[Any], moved: list[int], results: list[int]
) -> Callable[..., list[Any]]:
    """Return the equation as a function of some operands, with some results."""

    def function(*values: Any) -> list[Any]:
        everything = list(operands)
        for k, value in zip(moved, values, strict=True):
            everything[k] = value
        out = _jax.bind(eqn, *everything)
        return [out[k] for k in results]

    return function


def _flow(function: Callable[..., Any], operands: Any, moves: Any) -> list[Bits]:
    """For each result, the moves (as bits) that it is computed from."""
    jaxpr, _ = _jax.opened(jax.make_jaxpr(function)(operands, moves))
    skip = len(jaxpr.invars) - len(moves)
    return [bits >> skip for bits in Reach(_everything).summary(jaxpr).results]


def _everything(eqn: Any) -> list[Bits]:
    if eqn.primitive.name == "custom_lin":
        raise TypeError("a custom_vjp has no forward rule to read")
    return [(1 << len(eqn.invars)) - 1] * len(eqn.outvars)
