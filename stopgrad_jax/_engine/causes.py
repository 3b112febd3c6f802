"""Why a value is not connected to another: where its gradient ends, and by what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .connect import Reach, read
from .nested import nested
from .walk import Found, Plan, live


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
        taken = 0
        for index, eqn in enumerate(jaxpr.eqns):
            match, start = matches.get(index), taken
            if match is not None:
                taken += len(match.inside) + len(match.own)
            inner = nested(eqn)
            bits = [read(env, atom) for atom in eqn.invars]
            here = _jax.line_of(eqn) or line
            if inner is not None and not inner.rule:
                n, m = len(jaxpr.invars), len(jaxpr.outvars)
                plans = (match and match.plans) or (None,) * len(inner.bodies)
                for body, below in zip(inner.bodies, plans, strict=True):
                    end = start + (len(below.found) if below else 0)
                    asked = [
                        k is not None and eqn.outvars[k] in used for k in body.results
                    ]
                    for out, _ in body.feedback:
                        asked[out] = True
                    ins = [bits[k] for k in body.operands] + [
                        *sources[n + start : n + end]
                    ]
                    for out, back in body.feedback:
                        ins[back] |= _carried(env, eqn, body.results[out])
                    outs = [*asked, *sinks[m + start : m + end]]
                    yield from self.cuts(body.jaxpr, below, ins, outs, here)
                    start = end
                continue
            if any(bits) and any(v in used for v in eqn.outvars):
                results = self._reach.through(eqn, bits)
                if not all(results):
                    yield Cut(_reason(eqn), here)
                elif match and any(map(self._held, match.own)):
                    yield Cut("it is held constant by stop_gradients", here)


def _carried(env: dict[Any, int], eqn: Any, result: int | None) -> int:
    return 0 if result is None else read(env, eqn.outvars[result])


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
