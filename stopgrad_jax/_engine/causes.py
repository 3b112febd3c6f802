"""Why a value is not connected to another: where its gradient ends, and by what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .connect import Reach, read
from .nested import Nested, nested
from .walk import Found, Match, Plan, live


@dataclasses.dataclass(frozen=True)
class Cut:
    """An equation at which a gradient ends although its value goes on."""

    reason: str
    line: str


class Causes:
    """Follows one source forward and lists the cuts on its way to the sinks."""

    def __init__(self, reach: Reach, held: Callable[[Found], bool]) -> None:
        self._reach, self._held = reach, held

    def cuts(
        self,
        jaxpr: Any,
        plan: Plan | None,
        sources: Sequence[int],
        sinks: Sequence[bool],
        line: str = "",
    ) -> Iterator[Cut]:
        """Yield each cut of a gradient that starts at the `sources`.

        `sources` holds a bit for each input and for each found value, `sinks` a flag
        for each result and for each found value: is its value asked for?
        """
        env, _ = self._reach.follow(jaxpr, plan, sources)
        _, used = live(jaxpr, plan, sinks)
        matches = {m.index: m for m in plan.matches} if plan else {}
        n, m, end = len(jaxpr.invars), len(jaxpr.outvars), 0
        for index, eqn in enumerate(jaxpr.eqns):
            match, start = matches.get(index), end
            if match is not None:
                end += len(match.inside) + len(match.own)
            inner = nested(eqn)
            here = _jax.line_of(eqn) or line
            bits = [read(env, atom) for atom in eqn.invars]
            asked = [v in used for v in eqn.outvars]
            if inner is not None and not inner.rule:
                results = [read(env, v) for v in eqn.outvars]
                found = sources[n + start : n + end], sinks[m + start : m + end]
                below = _bodies(inner, match, bits, results, asked, *found)
                for arguments in below:
                    yield from self.cuts(*arguments, here)
            elif any(bits) and any(asked):
                if not all(self._reach.through(eqn, bits)):
                    yield Cut(_reason(eqn), here)
                elif match and any(map(self._held, match.own)):
                    yield Cut("it is held constant by stop_gradients", here)


def _bodies(
    inner: Nested,
    match: Match | None,
    operands: Sequence[int],
    results: Sequence[int],
    asked: Sequence[bool],
    sources: Sequence[int],
    sinks: Sequence[bool],
) -> Iterator[tuple[Any, Plan | None, list[int], list[bool]]]:
    """Yield the arguments of `cuts` for each body of an equation.

    `operands` and `results` are the bits outside, `asked` tells which results are
    used; `sources` and `sinks` are those of the values found inside.
    """
    plans = (match.plans if match else ()) or (None,) * len(inner.bodies)
    for body, plan in zip(inner.bodies, plans, strict=True):
        count = len(plan.found) if plan else 0
        inputs = [operands[k] for k in body.operands]
        outputs = [k is not None and asked[k] for k in body.results]
        for out, back in body.feedback:  # what a loop hands on, it uses
            k = body.results[out]
            inputs[back] |= 0 if k is None else results[k]
            outputs[out] = True
        yield body.jaxpr, plan, [*inputs, *sources[:count]], [*outputs, *sinks[:count]]
        sources, sinks = sources[count:], sinks[count:]


def _reason(eqn: Any) -> str:
    name = _jax.call_name(eqn) or eqn.primitive.name
    types = {str(v.aval.dtype) for v in eqn.outvars}
    if eqn.primitive.name == "stop_gradient":
        return "stop_gradient"
    if eqn.primitive.name in _jax.CUSTOM:
        return f"the custom rule of {name} returns zero"
    if not any(_jax.is_differentiable(v.aval) for v in eqn.outvars):
        return f"{name} returns {', '.join(sorted(types))}, which carries no gradient"
    return f"the derivative of {name} is zero"
