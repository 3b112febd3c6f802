"""What the results of a program are computed from at all, derivatives aside.

That is what a derivative rule is read for once it has become a program: its own
cotangents are values there, and may be compared, rounded and counted with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stopgrad_jax._program.control import Control, control
from stopgrad_jax._program.wiring import Body

from .apart import operands_by_result
from .reach import Bits, Reach, apply, rounds, union

# (equation) -> for each result, the operands (as bits) that it is computed from
_Read = Callable[[Any], Sequence[Bits]]


def all_that_flows(jaxpr: Any, by_gate: _Read | None = None) -> Sequence[Bits]:
    """For each result of a program, the inputs (as bits) that it is computed from.

    With `by_gate`, a gate counts as what that says of it, and not as the values that
    it returns.
    """

    def read(eqn: Any, moved: Bits | None) -> Sequence[Bits]:
        if eqn.primitive.name == "custom_lin":
            raise TypeError("a custom_vjp has no forward rule to read")
        return computed_from(eqn, by_gate)

    return _Computed(read).summary(jaxpr).results


def computed_from(eqn: Any, by_gate: _Read | None = None) -> Sequence[Bits]:
    """For each result of an equation, the operands (as bits) of which its value is.

    A gate's are its first operands, one by one, and those of a custom rule are what
    its function computes, whatever a derivative of them would be.
    """
    if eqn.primitive.name in GATES:
        if by_gate is not None:
            return by_gate(eqn)
        of_its_own = eqn.primitive.name == "pullback" and eqn.params["rule"].linear
        if not of_its_own:
            return [1 << k for k in range(len(eqn.outvars))]
    inner = control(eqn)
    if inner is not None and inner.rule:
        return all_that_flows(inner.bodies[0].jaxpr, by_gate)
    return operands_by_result(eqn)


GATES = ("gate", "pullback")  # a value's, and a tangent's


class _Computed(Reach):
    """Sums up jaxprs by what is computed from what, integers and booleans too."""

    def _carries(self, aval: Any) -> bool:
        return True

    def _decides(self, eqn: Any, inner: Control, operands: Sequence[Bits]) -> Bits:
        if inner.decides == "branch":
            return operands[0]
        if not inner.dynamic:
            return 0
        # `while x > 0`: x reaches all results, by how many rounds there are.
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
