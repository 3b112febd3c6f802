"""Which equations were made while one call of a function was running."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .executions import sums_anew
from .repeats import Again, Stack, begins_call


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a function: the equations made in it, in program order.

    `level` is that of the function in their stacks.
    """

    level: int
    indices: list[int]
    eqns: list[Any]
    last: Any = None  # the last of them that is none of a backward pass
    before: Call | None = None  # the call that it follows at once, if it is like it
    unclear: bool = False

    @property
    def is_unclear(self) -> bool:
        """Whether it cannot be told where it begins or ends."""
        before = self.before
        if before is None or self.unclear:
            return self.unclear
        # A function that JAX inlines is one instruction: it may have been cut in two.
        one = _jax.are_inlined(self.eqns[0], before.last)
        return one and _primitives(self) != _primitives(before)


class Calls:
    """Sorts equations, which are added in program order, into calls."""

    def __init__(self, eqns: Sequence[Any]) -> None:
        """Begin; `eqns` are all those of the program."""
        self._eqns = eqns
        self.found: dict[Any, list[Call]] = {}
        self._going: dict[Any, Call] = {}
        self._now: dict[Any, Call] = {}

    def step(self) -> None:
        """Go on to the next equation."""
        self._going, self._now = self._now, {}

    def add(self, key: Any, index: int, eqn: Any, stack: Stack, level: int) -> Call:
        """Note that a function, at `level` of the stack, made this equation."""
        full = (key, stack[:level], stack[level][0])
        call = self._going.get(full)
        # The equations of a backward pass have the stacks of the forward one again.
        backward = "transpose" in _jax.transforms_of(eqn)
        again = Again.NO
        if call is not None and not backward:
            again = self._again(call, index, stack)
        if call is None or again is Again.YES:
            call = Call(level, [], [], before=call)
            self.found.setdefault(key, []).append(call)
        call.unclear = call.unclear or again is Again.UNKNOWN
        call.indices.append(index)
        call.eqns.append(eqn)
        if not backward or call.last is None:
            call.last = eqn
        self._now[full] = call
        return call

    def _again(self, call: Call, index: int, stack: Stack) -> Again:
        last, eqn = _jax.stack_of(call.last), self._eqns[index]
        if _jax.are_inlined(eqn, call.last):
            if eqn.primitive is not call.eqns[0].primitive:
                return Again.NO

        def anew(k: int) -> Again:
            rest = itertools.islice(self._eqns, index, None)
            return sums_anew(call.eqns, rest, k)

        return begins_call(last, stack, call.level, anew)


def _primitives(call: Call) -> list[Any]:
    return [eqn.primitive for eqn in call.eqns]
