"""What the results of a program are computed from at all, derivatives aside.

That is what a derivative rule is read for once it has become a program: its own
cotangents are values there, and may be compared, rounded and counted with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .apart import operands_of
from .connect import Bits, Reach, apply, rounds, union
from .nested import Body, Nested


def all_that_flows(jaxpr: Any) -> Sequence[Bits]:
    """For each result of a program, the inputs (as bits) that it is computed from."""
    return _Computed(_everything).summary(jaxpr).results


def _everything(eqn: Any, moved: Bits | None) -> list[Bits]:
    if eqn.primitive.name == "custom_lin":
        raise TypeError("a custom_vjp has no forward rule to read")
    return operands_of(eqn)


class _Computed(Reach):
    """Sums up jaxprs by what is computed from what, integers and booleans too."""

    def _carries(self, aval: Any) -> bool:
        return True

    def _decides(self, eqn: Any, inner: Nested, operands: Sequence[Bits]) -> Bits:
        if eqn.primitive.name == "cond":
            return operands[0]
        if not inner.dynamic:
            return 0
        condition, body = inner.bodies
        carried = self._carried(body, operands)
        start = len(condition.operands) - len(carried)
        read = [operands[k] for k in condition.operands[:start]] + carried
        return union(
            apply(bits, read) for bits in self.summary(condition.jaxpr).results
        )

    def _carried(self, body: Body, operands: Sequence[Bits]) -> list[Bits]:
        """Bits of what a loop carries, in any round."""
        inputs = [operands[k] for k in body.operands]
        inputs = rounds(body, self.summary(body.jaxpr), inputs, [])
        return [inputs[back] for _, back in body.feedback]
