"""Where gradients end although their values go on, and why.

A *cut* is an expression of the user's code that a gradient enters and does not leave,
while its value does. What JAX or a library stops inside a call that passes the
gradient on as a whole (softmax subtracts a stopped maximum) is none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import stopgrad_jax._jax as _jax

from .connect import Bits
from .graph import Graph, Op, Value
from .labels import Path, Spot, printed_place


@dataclasses.dataclass(frozen=True)
class Cut:
    """An expression at which gradients end.

    Attributes:
      reason: "stop_gradient", "zero_derivative", "integer", "comparison", "sampled",
        "zero_rule", "overwritten", "held", or "unknown".
      words: the same in words; `brief` in fewer.
      op: the number of the operation at which they end.
      ops: the numbers of all operations of the expression.
      lost: the sources whose gradient ends here, as bits.
      path: where it is, from the outermost call of the user's.
    """

    reason: str
    words: str
    brief: str
    op: int
    ops: range
    lost: Bits
    path: Path

    @property
    def spot(self) -> Spot | None:
        """The user's expression, or None where there is no source."""
        return self.path.spots[-1] if self.path.spots else None

    @property
    def place(self) -> str:
        """`file:line`, or "" where there is no source."""
        return self.spot.place if self.spot else ""

    @property
    def is_quiet(self) -> bool:
        """Whether it is told only where nothing else explains a zero."""
        return self.reason == "comparison"


class Analysis:
    """What reaches what in a graph, from some sources to some sinks.

    `tangent[v]` and `value[v]` hold the sources (as bits) that reach value v through
    derivatives, and at all; `arrives[v]` and `used[v]` tell whether the gradient of
    the sinks comes back to it, and whether they are computed from it.
    """

    def __init__(
        self, graph: Graph, sources: Sequence[Iterable[Value]], sinks: Iterable[Value]
    ) -> None:
        self.graph, self.sinks = graph, list(sinks)
        self.sources = [list(values) for values in sources]
        self._start = [(v, 1 << k) for k, vs in enumerate(self.sources) for v in vs]
        self.tangent = graph.forward(self._start, graph.grads)
        self.value = graph.forward(self._start, graph.feeds)
        self.arrives = graph.backward(self.sinks, graph.grads)
        self.used = graph.backward(self.sinks, graph.feeds)

    def reached(self, bits: Sequence[Bits], sinks: Iterable[Value]) -> Bits:
        """Return the sources that reach any of the sinks."""
        return functools.reduce(int.__or__, (bits[v] for v in sinks), 0)

    @functools.cached_property
    def unmasked(self) -> list[Bits]:
        """As `tangent`, but not through a relu, a max, or one case of several."""
        graph = self.graph
        through = graph.without(lambda op: op.masks)
        return graph.forward(self._start, through, graph.cases)

    @functools.cached_property
    def sure(self) -> list[Bits]:
        """As `tangent`, but only through rules that are known."""
        if all(op.known for op in self.graph.ops):
            return self.tangent
        through = self.graph.without(lambda op: not op.known)
        return self.graph.forward(self._start, through)

    def lost_on_the_way(self, source: Bits, bits: Sequence[Bits]) -> list[Op]:
        """Operations at which a source is lost in these bits, and not in `tangent`."""
        graph, out = self.graph, []
        for op in graph.ops:
            for v in op.values:
                passes = self.tangent[v] & source & ~bits[v] and self.arrives[v]
                if passes and any(bits[s] & source for s in graph.grads[v]):
                    out.append(op)
                    break
        return out

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """All cuts on the way to the sinks, in program order."""
        return list(self._cuts())

    def _cuts(self) -> Iterator[Cut]:
        ops, first = self.graph.ops, 0
        for k in range(len(ops) + 1):
            spots = ops[k].path.spots if k < len(ops) else None
            same = first < k < len(ops) and spots and spots == ops[first].path.spots
            if k and not same:
                yield from self._cut(range(first, k))
            if not same:
                first = k

    def _cut(self, group: range) -> Iterator[Cut]:
        """Yield the cut that an expression is, if it is one."""
        lost = {k: bits for k in group if (bits := self._lost(k))}
        if not lost:
            return
        everything = functools.reduce(int.__or__, lost.values())
        gone = everything & ~self._leaving(group)
        if not gone:
            return
        for k, bits in lost.items():
            if bits & gone:
                op = self.graph.ops[k]
                yield Cut(*why(op), k, group, gone, op.path)
                return

    def _lost(self, number: int) -> Bits:
        """Sources whose gradient would come to an operation and does not leave it."""
        graph, op, out = self.graph, self.graph.ops[number], 0
        used = [v for v in op.values if self.used[v]]
        if not used or op.join:
            return 0
        passed = {s for v in used for s in graph.grads[v]}
        left = self.reached(self.tangent, used) if op.overwrites else 0
        for source in graph.feeds[used[0]]:
            if bits := self.tangent[source]:
                out |= bits & ~left if op.overwrites else 0
                out |= 0 if source in passed or op.overwrites else bits
        return out

    def _leaving(self, group: range) -> Bits:
        """Sources whose gradient leaves an expression, or would, were there one."""
        graph, bits = self.graph, 0
        sinks = set(self.sinks)
        for k in group:
            for value in graph.ops[k].values:
                if not self.used[value]:
                    continue
                outside = any(r not in group for r in graph.readers[value])
                if outside or value in sinks:
                    bits |= self.tangent[value]
        return bits


def why(op: Op) -> tuple[str, str, str]:
    """Return the reason for which a gradient ends at an operation, and its words."""
    eqn, spot, name, primitive = op.eqn, op.spot, op.name, op.eqn.primitive.name
    if op.held:
        words = "held constant by stop_gradients"
        return "held", words, words
    if op.overwrites:
        words = "overwritten: a later write replaces all of it"
        return "overwritten", words, "overwrites it"
    if op.path.sampler:
        words = f"sampled by {name}, and a sample has no derivative"
        return "sampled", words, "sampled"
    if primitive == "stop_gradient":
        return "stop_gradient", "stop_gradient, on purpose", ""
    if not any(_jax.is_differentiable(v.aval) for v in eqn.outvars):
        types = ", ".join(sorted({str(v.aval.dtype) for v in eqn.outvars}))
        brief = f"returns {types}"
        if types == "bool":
            compares = spot is None or spot.is_comparison or not spot.callee
            called = "only compared: the comparison" if compares else name
            words = f"{called} returns bool, and a bool carries no gradient"
            return "comparison", words, brief
        kind = "integers carry" if "int" in types else f"{types} carries"
        return "integer", f"{name} {brief}, {kind} no gradient", brief
    if primitive in _jax.CUSTOM:
        rule, at = _jax.call_name(eqn), printed_place(_jax.rule_site(eqn))
        words = f"the custom rule of {rule} returns zero"
        return "zero_rule", f"{words} ({at})" if at else words, "its rule returns zero"
    if rule := _jax.gate_name(eqn):
        if rule == "with_backward":
            words = "the backward function returns None for it"
            return "zero_rule", words, "backward returns None"
        words = f"{name} takes its value and not its derivative, on purpose"
        return "zero_rule", words, ""
    words = f"the derivative of {name} is zero almost everywhere"
    return "zero_derivative", words, "derivative is zero"
