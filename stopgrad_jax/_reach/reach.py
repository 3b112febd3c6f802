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
from stopgrad_jax._program.control import Control, control
from stopgrad_jax._program.search import Found, Match, Plan
from stopgrad_jax._program.wiring import Body

from .decided import Decided
from .overwrites import Overwrites
from .references import carries, fed_back, is_about_refs, refs_of, touched

Bits = int
# (equation, the operands that move as bits, or None where it does not matter) -> for
# each result, the operands (as bits) whose tangent it depends on
Dependence = Callable[[Any, Bits | None], Sequence[Bits]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the results of a jaxpr, and the values found in it, are connected to.

    Bit i is input i; with n inputs, bit n + k is the k-th found value. `refs` holds
    what its inputs that are references hold in the end.
    """

    results: Sequence[Bits]
    found: Sequence[Bits]
    refs: Sequence[Bits] = ()

    @property
    def handed_on(self) -> list[Bits]:
        """What another round gets: results, then what is left in references."""
        return [*self.results, *self.refs]


class Moves:
    """Sums up jaxprs by what JAX takes to move, whether or not a rule uses it.

    That is what a custom rule with symbolic zeros is told. `held(found)` tells which
    found values pass nothing on.
    """

    def __init__(
        self, dependence: Dependence, held: Callable[[Found], bool] = lambda f: False
    ) -> None:
        self._dependence = dependence
        self._held = held
        self._overwrites = Overwrites()
        self._summaries: dict[Any, Summary] = {}

    def summary(
        self, jaxpr: Any, plan: Plan | None = None, moved: Sequence[Bits] | None = None
    ) -> Summary:
        """Sum up a jaxpr, with what the plan found in it."""
        moved = self._that_matter(jaxpr, moved)
        key = (id(jaxpr), id(plan), moved)
        if key not in self._summaries:
            n = len(jaxpr.invars)
            sources = [1 << k for k in range(n + (len(plan.found) if plan else 0))]
            env, found = self.follow(jaxpr, plan, sources, moved)
            results = [read(env, atom) for atom in jaxpr.outvars]
            refs = [env[jaxpr.invars[k]] for k in refs_of(jaxpr)]
            self._summaries[key] = Summary(results, found, refs)
        return self._summaries[key]

    def follow(
        self,
        jaxpr: Any,
        plan: Plan | None,
        sources: Sequence[Bits],
        moved: Sequence[Bits] | None = None,
        eqns: Iterable[int] | None = None,
    ) -> tuple[dict[Any, Bits], list[Bits]]:
        """Return the bits of every variable and of every found value.

        `sources` holds the bits of each input, then those of each found value, `moved`
        likewise whether they move, where that matters. Only the `eqns` of these numbers
        are looked at, if given.
        """
        env = dict(zip(jaxpr.invars, sources, strict=False))
        jaxpr = self._program(jaxpr)
        wanted = None if eqns is None else set(eqns)
        matches = {m.index: m for m in plan.matches} if plan else {}
        found: list[Bits] = []
        flags = self.moving(jaxpr, plan, moved)
        overwritten = self._overwrites(jaxpr, plan)
        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(env, atom) for atom in eqn.invars]
            match = matches.get(index)
            start = len(jaxpr.invars) + len(found)
            count = len(match.inside) + len(match.own) if match else 0
            mine = sources[start : start + count]
            moving = None
            if moved is not None:
                moving = [read(flags, a) for a in eqn.invars], moved[start:][:count]
            left = None
            if index in overwritten:
                parts = [read(env, atom) for atom in overwritten[index]]
                left = self._left(operands, parts)
            if wanted is not None and index not in wanted:
                found += [0] * count
            # What no source comes to is not asked: its rule might raise.
            elif match is not None or any(operands):
                results, inside, refs = self._equation(
                    eqn, match, operands, mine, moving, left
                )
                env.update(zip(eqn.outvars, results, strict=True))
                env.update((eqn.invars[k], bits) for k, bits in refs.items())
                found += inside
        return env, found

    def _program(self, jaxpr: Any) -> Any:
        """Return a jaxpr with what constants decide, which JAX does not look at."""
        return jaxpr

    def _inside(self, eqn: Any) -> Control | None:
        """Describe an equation's inner jaxprs."""
        return control(eqn)

    def _left(self, operands: Sequence[Bits], left: Sequence[Bits]) -> Bits:
        """Bits of an array of which a part was overwritten: JAX does not see it."""
        return union(operands)

    def _that_matter(self, jaxpr: Any, moved: Any) -> None:
        """Say what of `moved` makes a difference in a jaxpr."""
        return None

    def moving(self, jaxpr: Any, plan: Plan | None, moved: Any) -> dict[Any, Bits]:
        """Tell for each variable whether it moves."""
        return {}

    def _equation(
        self,
        eqn: Any,
        match: Match | None,
        operands: Sequence[Bits],
        sources: Sequence[Bits],
        moving: tuple[Sequence[Bits], Sequence[Bits]] | None,
        left: Bits | None,
    ) -> tuple[list[Bits], list[Bits], dict[int, Bits]]:
        """Bits of an equation's results, of what is found, of references it writes.

        `left` are those of the result of a write that replaces another.
        """
        inner, split = self._inside(eqn), len(match.inside) if match else 0
        refs: dict[int, Bits] = {}
        if inner is not None and not inner.rule:
            plans = (match.plans if match else ()) or (None,) * len(inner.bodies)
            results, found, refs = self._nested(
                eqn, inner, plans, operands, sources[:split], moving
            )
        elif is_about_refs(eqn):
            results, refs = touched(eqn, operands, self._carries)
            found = [0] * split
        elif left is not None:
            results, found = [left], [0] * split
        else:
            pattern = None if moving is None else _as_bits(moving[0])
            table = self._dependence(eqn, pattern)
            results, found = [apply(bits, operands) for bits in table], [0] * split
        own = zip(match.own, sources[split:], strict=True) if match else ()
        for k, (value, source) in enumerate(own):
            results[k] = source | (0 if self._held(value) else results[k])
            found.append(results[k])
        return results, found, refs

    def _nested(
        self,
        eqn: Any,
        inner: Control,
        plans: Sequence[Plan | None],
        operands: Sequence[Bits],
        sources: Sequence[Bits],
        moving: tuple[Sequence[Bits], Sequence[Bits]] | None,
    ) -> tuple[list[Bits], list[Bits], dict[int, Bits]]:
        """As `_equation`, for one that holds programs: by the summary of each body.

        A body is summed up once, whatever comes to it and however often it runs.
        """
        results, found = [0] * len(eqn.outvars), list[Bits]()
        refs: dict[int, Bits] = {}
        never = inner.may_run_no_round
        flags, own_flags = moving or (None, ())
        for body, plan in zip(inner.bodies, plans, strict=True):
            count = len(plan.found) if plan else 0
            mine, sources = list(sources[:count]), sources[count:]
            inputs, moved = [operands[k] for k in body.operands], None
            if flags is not None:
                moved = [flags[k] for k in body.operands]
                moved = self.entering(body, plan, moved, own_flags[:count])
                own_flags = own_flags[count:]
            summary = self.summary(body.jaxpr, plan, moved)
            runs = not inner.is_empty
            if runs:
                inputs = rounds(body, summary, inputs, mine)
            for k, bits in zip(body.results, summary.results, strict=True):
                if k is not None and runs:
                    results[k] |= apply(bits, inputs + mine)
            # Of no round, a loop returns what it was begun with.
            for out, back in body.feedback if never else ():
                if (k := body.results[out]) is not None:
                    results[k] |= inputs[back]
            for k, bits in zip(refs_of(body.jaxpr), summary.refs, strict=True):
                known = refs.get(body.operands[k], 0) | (inputs[k] if never else 0)
                refs[body.operands[k]] = known | apply(bits, inputs + mine)
            found += [apply(bits, inputs + mine) for bits in summary.found]
        by_choice = self._decides(eqn, inner, operands)
        refs = {k: bits | by_choice for k, bits in refs.items()}
        pairs = zip(results, eqn.outvars, strict=True)
        results = [b | by_choice if self._carries(v.aval) else 0 for b, v in pairs]
        return results, found, refs

    def _carries(self, aval: Any) -> bool:
        """Whether what is summed up comes through a value of this type."""
        return carries(aval)

    def _decides(self, eqn: Any, inner: Control, operands: Sequence[Bits]) -> Bits:
        """Bits that come to all results through what decides which body runs."""
        return 0

    def entering(
        self, body: Body, plan: Plan | None, inputs: list[Bits], own: Sequence[Bits]
    ) -> Sequence[Bits] | None:
        """Whether each input and found value of a body moves, in some round."""
        return None


class Reach(Moves):
    """Sums up jaxprs by what derivative rules hand on.

    `moves` tells what moves, and `by_pattern(eqn)` whether that makes a difference to
    the equation's own rule.
    """

    def __init__(
        self,
        dependence: Dependence,
        held: Callable[[Found], bool] = lambda found: False,
        moves: Moves | None = None,
        by_pattern: Callable[[Any], bool] = lambda eqn: False,
    ) -> None:
        super().__init__(dependence, held)
        self._moves, self._by_pattern = moves, by_pattern
        self._holding: dict[int, bool] = {}
        self._decided = Decided()

    def _program(self, jaxpr: Any) -> Any:
        return self._decided.program(jaxpr)

    def _inside(self, eqn: Any) -> Control | None:
        return self._decided.control(eqn)

    def matters(self, jaxpr: Any) -> bool:
        """Tell whether a jaxpr holds an equation whose rule is told what moves."""
        if self._moves is None:
            return False
        if id(jaxpr) not in self._holding:
            self._holding[id(jaxpr)] = any(map(self._is_told, jaxpr.eqns))
        return self._holding[id(jaxpr)]

    def _is_told(self, eqn: Any) -> bool:
        inner = control(eqn)
        if inner is None or inner.rule:
            return self._by_pattern(eqn)
        return any(self.matters(body.jaxpr) for body in inner.bodies)

    def _left(self, operands: Sequence[Bits], left: Sequence[Bits]) -> Bits:
        return union(left)

    def _that_matter(self, jaxpr: Any, moved: Any) -> Any:
        # Without a rule that is told what moves, one summary is for all that may move.
        if moved is None or not self.matters(jaxpr):
            return None
        return tuple(int(bool(flag)) for flag in moved)

    def moving(self, jaxpr: Any, plan: Plan | None, moved: Any) -> dict[Any, Bits]:
        if moved is None or self._moves is None or not self.matters(jaxpr):
            return {}
        return self._moves.follow(jaxpr, plan, moved)[0]

    def entering(
        self, body: Body, plan: Plan | None, inputs: list[Bits], own: Sequence[Bits]
    ) -> Sequence[Bits] | None:
        if self._moves is None or not self.matters(body.jaxpr):
            return None
        summary = self._moves.summary(body.jaxpr, plan)
        return [*rounds(body, summary, inputs, list(own)), *own]


def rounds(
    body: Body, summary: Summary, inputs: list[Bits], own: list[Bits]
) -> list[Bits]:
    """Bits of a body's inputs after as many rounds as there may be."""
    pairs, handed_on = fed_back(body), summary.handed_on
    changed = bool(pairs)
    # Bits are only added, so that this ends.
    while changed:
        changed = False
        for out, back in pairs:
            bits = inputs[back] | apply(handed_on[out], inputs + own)
            changed |= bits != inputs[back]
            inputs[back] = bits
    return inputs


def read(env: dict[Any, Bits], atom: Any) -> Bits:
    """Bits of a variable; a literal or a constant has none."""
    return 0 if isinstance(atom, _jax.Literal) else env.get(atom, 0)


def union(sources: Iterable[Bits]) -> Bits:
    """Bits of what is computed from all of these."""
    return functools.reduce(int.__or__, sources, 0)


def apply(bits: Bits, sources: Sequence[Bits]) -> Bits:
    """Bits of what is connected to those of the sources that `bits` names."""
    out = 0
    while bits:
        low = bits & -bits
        out |= sources[low.bit_length() - 1]
        bits ^= low
    return out


def _as_bits(flags: Iterable[Bits]) -> Bits:
    return sum(1 << k for k, flag in enumerate(flags) if flag)
