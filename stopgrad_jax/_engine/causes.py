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
        "zero_rule", "overwritten" or "held".
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
        return _union(bits[v] for v in sinks)

    @functools.cached_property
    def unmasked(self) -> list[Bits]:
        """As `tangent`, but not through a relu, a max, or one case of several."""
        graph = self.graph
        through = graph.without(lambda op: op.masks)
        return graph.forward(self._start, through, graph.cases)

    @functools.cached_property
    def refused(self) -> list[Bits]:
        """The sources that reach a value through an operation without a rule."""
        graph = self.graph
        unknown = [v for op in graph.ops if not op.known for v in op.values]
        start = [(v, self.tangent[v]) for v in unknown]
        return graph.forward(start, graph.grads) if unknown else [0] * len(graph.maker)

    def refusing(self, source: Bits) -> list[Op]:
        """The operations without a rule on a source's way to the sinks."""
        return [
            op
            for op in self.graph.ops
            if not op.known
            and any(self.tangent[v] & source and self.arrives[v] for v in op.values)
        ]

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
        ops = self.graph.ops
        lost = {k: bits for k in group if (bits := self._lost(ops[k]))}
        if not lost:
            return
        leaving = [v for k in group for v in ops[k].values if self._leaves(v, group)]
        gone = _union(lost.values()) & ~self.reached(self.tangent, leaving)
        if not gone:  # an integer may go on beside what has a gradient, as in top_k
            leaving = [v for v in leaving if not self._carries(v)]
            ends = {self.graph.maker[v] for v in leaving}
            gone = _union(bits for k, bits in lost.items() if k in ends)
        if gone:
            at = [k for k, bits in lost.items() if bits & gone]
            types = {str(self.graph.avals[v].dtype) for v in leaving}
            exact = not any(map(self._carries, leaving))
            words = why([ops[k] for k in at], types if exact else set())
            yield Cut(*words, at[0], group, gone, ops[at[0]].path)

    def _carries(self, value: Value) -> bool:
        return _jax.is_differentiable(self.graph.avals[value])

    def _leaves(self, value: Value, group: range) -> bool:
        """Whether a value is used outside of an expression."""
        readers = (r for r in self.graph.readers[value] if r not in group)
        outside = any(any(map(self._is_used, self._made(r))) for r in readers)
        return self._is_used(value) and (outside or value in self._ends)

    def _made(self, number: int) -> list[Value]:
        return self.graph.ops[number].values

    def _is_used(self, value: Value) -> bool:
        return bool(self.used[value]) and hasattr(self.graph.avals[value], "dtype")

    @functools.cached_property
    def _ends(self) -> set[Value]:
        return set(self.sinks)

    def _lost(self, op: Op) -> Bits:
        """Sources whose gradient would come to an operation and does not leave it."""
        used = [v for v in op.values if self._is_used(v)]
        if not used or op.join:
            return 0
        graph = self.graph
        if op.overwrites:
            left = self.reached(self.tangent, used)
            return self.reached(self.tangent, graph.feeds[used[0]]) & ~left
        # What an integer is made of ends at it, whatever the other results are.
        exact = not all(map(self._carries, used))
        passed = set() if exact else {s for v in used for s in graph.grads[v]}
        rest = [s for s in graph.feeds[used[0]] if s not in passed]
        return self.reached(self.tangent, rest)


def _union(bits: Iterable[Bits]) -> Bits:
    return functools.reduce(int.__or__, bits, 0)


def why(ops: Sequence[Op], exact: set[str]) -> tuple[str, str, str]:
    """Return the reason for which a gradient ends in an expression, and its words.

    Args:
      ops: the operations at which it ends.
      exact: the dtypes of what the expression returns, if none carries a gradient.
    """
    op = ops[0]
    spot, name = op.spot, op.name
    if op.held:
        words = "held constant by stop_gradients"
        return "held", words, words
    if op.overwrites:
        words = "overwritten: a later write replaces all of it"
        return "overwritten", words, "overwrites it"
    if op.path.sampler:
        words = f"sampled by {name}, and a sample has no derivative"
        return "sampled", words, "sampled"
    if exact:
        return _exact(op, ", ".join(sorted(exact)))
    for op in ops:
        if op.eqn.primitive.name == "stop_gradient":
            return "stop_gradient", "stop_gradient, on purpose", ""
        if _jax.kind_of(op.eqn) in _jax.CUSTOM:
            at = printed_place(_jax.rule_site(op.eqn))
            words = f"the custom rule of {_jax.call_name(op.eqn)} returns zero"
            words += f" ({at})" if at else ""
            return "zero_rule", words, "its rule returns zero"
        if rule := _jax.gate_name(op.eqn):
            if rule == "with_backward":
                words = "the backward function returns None for it"
                return "zero_rule", words, "backward returns None"
            words = f"{name} takes its value and not its derivative, on purpose"
            return "zero_rule", words, ""
    if spot is not None and not spot.callee and len(spot.expression) <= 40:
        name = spot.expression or name  # an operator: a // b
    words = f"the derivative of {name} is zero almost everywhere"
    return "zero_derivative", words, "derivative is zero"


def _exact(op: Op, types: str) -> tuple[str, str, str]:
    """Words for what returns integers or booleans."""
    spot, brief = op.spot, f"returns {types}"
    if types == "bool":
        compares = spot is None or not spot.callee
        called = "only compared: the comparison" if compares else op.name
        words = f"{called} returns bool, and a bool carries no gradient"
        return "comparison", words, brief
    kind = "integers carry" if "int" in types else f"{types} carries"
    return "integer", f"{op.name} {brief}, {kind} no gradient", brief
