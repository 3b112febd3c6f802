"""`sg.op(..., nth=...)`: some of the matches, in program order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator
from typing import Any

from stopgrad_jax._address import Op
from stopgrad_jax._errors import AddressError, wrong

from .control import control
from .operations import Group
from .plan import Found, Match, Plan
from .search import Search, lifted

INNER = "jax.grad(sg.edit(f, ...)): the address in the inner function"


def how_many(plan: Plan, target: int) -> int:
    """Return how many operations of a program an address matches."""
    return sum(1 for _ in _operations(plan, target))


def require_told(found: Search, plan: Plan, op: Op, target: int, called: str) -> None:
    """Refuse an address that may mean a call which may be several, or leaves some out.

    Of a call whose derivative has been taken too little is left to be an operation.
    """
    line = taken(found, plan, target)
    if line:
        raise wrong(
            AddressError,
            f"{called}: address {op!r}",
            "it must mean all calls, and no derivative of them may be taken yet",
            f"one whose derivative has been taken ({line}), beside others",
            f"{INNER}, or within= for a part",
        )
    why = unclear(plan, op, target)
    if why:
        raise wrong(
            AddressError,
            f"{called}: address {op!r}",
            "it must be told where each call begins and ends",
            f"a call whose end cannot be told: {why}",
            "a jitted function, or an operation in it",
        )


def taken(found: Search, plan: Plan, target: int) -> str:
    """Return the line of a call that is left out beside those found, or ""."""
    return found.taken.get(target, "") if how_many(plan, target) else ""


def unclear(plan: Plan, op: Op, target: int) -> str:
    """Say why it cannot be told which operations an address means, or "".

    A call whose end cannot be told may be several. That matters unless `nth` means the
    same others, however many it is.
    """
    every = list(_operations(plan, target))
    reasons = [x.unclear for x in every if isinstance(x, Group) and x.unclear]
    meant = set[tuple[int, ...]]()
    # Counted as one, two and three calls: what `nth` means is clear if it is the same
    # each time, as `nth=0` is of a clear call before an unclear one.
    for times in (1, 2, 3) if reasons else ():
        parts = [[x] * (times if _is_unclear(x) else 1) for x in every]
        calls = [x for part in parts for x in part]
        try:
            chosen = [calls[k] for k in op.chosen(len(calls))]
        except IndexError:
            return reasons[0]
        if any(map(_is_unclear, chosen)):
            return reasons[0]
        meant.add(tuple(map(id, chosen)))
    return reasons[0] if len(meant) > 1 else ""


def _is_unclear(operation: Any) -> bool:
    return isinstance(operation, Group) and bool(operation.unclear)


def narrowed(plan: Plan, target: int, chosen: Container[int]) -> Plan:
    """Return a plan in which an address means those of its matches only.

    A body that is run in several places is taken apart: each has its own matches.
    """
    return _Narrowed(target, chosen).plan(plan)


def _operations(plan: Plan, target: int) -> Iterator[Any]:
    """Yield each operation that an address means, in program order."""
    seen = set[int]()
    for match in plan.matches:
        for body in match.plans:
            yield from _operations(body, target)
        for operation in _own(match, target):
            if id(operation) not in seen:
                seen.add(id(operation))
                yield operation


def _own(match: Match, target: int) -> Iterator[Any]:
    """Yield the operations of an address that an equation is, or is the end of."""
    hits = [hit for found in match.own for hit in found.hits if hit.target == target]
    yield from dict.fromkeys(hit.group or match for hit in hits)


class _Narrowed:
    def __init__(self, target: int, chosen: Container[int]) -> None:
        self._target, self._chosen = target, chosen
        self._number = itertools.count()

    def plan(self, plan: Plan) -> Plan:
        # Anew each time: where a body is run once more its operations are further ones.
        numbers: dict[int, int] = {}
        matches = tuple(self._matches(plan, numbers))
        found = tuple(f for match in matches for f in (*match.inside, *match.own))
        return Plan(plan.jaxpr, plan.consts, matches, found)

    def _matches(self, plan: Plan, numbers: dict[int, int]) -> Iterator[Match]:
        """Yield the matches of a plan that are left with the chosen operations alone.

        Bodies come before their equation: `nth` counts as `_operations` does.
        """
        for match in plan.matches:
            plans = tuple(map(self.plan, match.plans))
            for operation in _own(match, self._target):
                if id(operation) not in numbers:
                    numbers[id(operation)] = next(self._number)
            own = tuple(self._kept(f, match, numbers) for f in match.own)
            own = own if any(f.hits for f in own) else ()
            inner = control(match.eqn)
            inside: tuple[Found, ...] = ()
            if inner is not None:
                every = (found for plan in plans for found in plan.found)
                inside = tuple(lifted(found, inner, match.eqn) for found in every)
            if own or inside:
                yield Match(
                    match.index, match.eqn, own, plans if inside else (), inside
                )

    def _kept(self, found: Found, match: Match, numbers: dict[int, int]) -> Found:
        hits = tuple(
            hit
            for hit in found.hits
            if hit.target != self._target
            or numbers[id(hit.group or match)] in self._chosen
        )
        return dataclasses.replace(found, hits=hits)
