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
from typing import Any

import stopgrad_jax._jax as _jax

from .nested import Nested, nested
from .overwrite import Overwrites
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
        dependence: Dependence,
        held: Callable[[Found], bool] = lambda found: False,
    ) -> None:
        self._dependence = dependence
        self._held = held
        self._overwrites = Overwrites()
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
        overwritten = self._overwrites(jaxpr, plan.consts if plan else ())
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
            if index in overwritten and match is None:
                left = [read(env, atom) for atom in overwritten[index]]
                env[eqn.outvars[0]] = _union(left)
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
