"""Where gradients end although their values go on, and why.

A *cut* is an expression of the user's code that a gradient enters and does not leave,
while its value does, or does not leave by one of its results. What JAX or a library
stops inside a call that passes the gradient on as a whole (softmax subtracts a stopped
maximum) is none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._places import printed_place
from stopgrad_jax._source.labels import Path, Spot

from .graph import Graph, Node, Operation
from .naming import callee_of, zero
from .own_stop import is_handed, is_own_stop, is_straight_through
from .reach import Bits


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
      path: where it is, from the outermost call of the user's. Its `inside` is the
        other library's own expression, if the user's is a call of one.
      edit: the address of the edit that put it there, or "".
    """

    reason: str
    words: str
    brief: str
    op: int
    ops: range
    lost: Bits
    path: Path
    edit: str = ""

    @property
    def spot(self) -> Spot | None:
        """The user's expression, or None where there is no source."""
        return self.path.spots[-1] if self.path.spots else None

    @property
    def place(self) -> str:
        """`file:line`, or "" where there is no source."""
        if self.spot is None and self.edit:
            return f"(edit of {self.edit})"
        return self.spot.place if self.spot else ""

    @property
    def told(self) -> str:
        """The words, without the place of a rule where that is the expression's own."""
        return self.words.removesuffix(f" ({self.place})")

    @property
    def places(self) -> str:
        """The user's place and, in another library, the line there; "" without any."""
        inside = self.path.inside
        return ", in ".join(filter(None, [self.place, inside.place if inside else ""]))

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
        self, graph: Graph, sources: Sequence[Iterable[Node]], sinks: Iterable[Node]
    ) -> None:
        self.graph, self.sinks = graph, list(sinks)
        self.sources = [list(values) for values in sources]
        self._start = [(v, 1 << k) for k, vs in enumerate(self.sources) for v in vs]
        self.tangent = graph.forward(self._start, graph.grads)
        self.value = graph.forward(self._start, graph.feeds)
        self.arrives = graph.backward(self.sinks, graph.grads)
        self.used = graph.backward(self.sinks, graph.feeds)

    def reached(self, bits: Sequence[Bits], sinks: Iterable[Node]) -> Bits:
        """Return the sources that reach any of the sinks."""
        return _union(bits[v] for v in sinks)

    @functools.cached_property
    def unmasked(self) -> list[Bits]:
        """As `tangent`, but not through a relu, a max, or one case of several."""
        graph = self.graph
        through = graph.without(lambda op: op.masks)
        return graph.forward(self._start, through, graph.cases)

    @functools.cached_property
    def moving(self) -> list[Bits]:
        """The sources with which JAX takes a value to move, as all of a custom_vjp."""
        graph = self.graph
        if not graph.moves:
            return self.tangent
        through = list(graph.grads)
        for value, sources in graph.moves.items():
            through[value] = sources
        return graph.forward(self._start, through)

    @functools.cached_property
    def refused(self) -> list[Bits]:
        """The sources that reach a value through an operation whose rule raises."""
        graph = self.graph
        pairs = [(op, self._refuses(op)) for op in graph.ops if not op.known]
        # JAX raises where a tangent is to be handed back, as of a loop's other carries.
        start = [(v, bits & self.moving[v]) for op, bits in pairs for v in op.values]
        return graph.forward(start, graph.grads) if start else [0] * len(graph.maker)

    @functools.cached_property
    def raising(self) -> Bits:
        """The sources by which JAX raises as soon as they move, whatever comes back."""
        return _union(
            self._refuses(op) for op in self.graph.ops if op.always and not op.known
        )

    def refusing(self, source: Bits) -> list[Operation]:
        """The operations whose rule raises, for a source."""
        return [
            op
            for op in self.graph.ops
            if not op.known
            and self._refuses(op) & source
            and (op.always or any(self._comes_back(v, source) for v in op.values))
        ]

    def _comes_back(self, value: Node, source: Bits) -> bool:
        """Tell whether a gradient comes to a value that moves with a source."""
        return bool(self.arrives[value] and self.moving[value] & source)

    def _refuses(self, op: Operation) -> Bits:
        """The sources by which an operation cannot be differentiated."""
        values = [*op.refusing, *(op.inputs if op.refuses < 0 else ())]
        moving = self.reached(self.moving, (v for v in values if v is not None))
        return moving | max(op.refuses, 0)

    def masking(self, source: Bits) -> list[Operation]:
        """The relus, maxima and choices of case that all ways of a source go through.

        One that a residual goes round is none: not all gradient is lost there.
        """
        graph, bits, behind = self.graph, self.unmasked, [0] * len(self.graph.maker)
        waiting = [(sink, source) for sink in self.sinks]
        while waiting:
            value, more = waiting.pop()
            more &= self.tangent[value] & ~bits[value] & ~behind[value]
            if more:
                behind[value] |= more
                waiting += ((before, more) for before in graph.grads[value])

        def lost(value: Node) -> bool:
            return any(bits[s] & behind[value] for s in graph.grads[value])

        return [op for op in graph.ops if any(map(lost, op.values))]

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """All cuts on the way to the sinks, in program order."""
        return list(self._in_each_expression())

    def _in_each_expression(self) -> Iterator[Cut]:
        for group in self._runs(range(len(self.graph.ops)), lambda op: op.path.spots):
            lost, types = self._gone(group)
            if lost and any(self.graph.ops[k].path.library for k in lost):
                yield from self._in_library(group, lost)
            elif lost:
                yield self._cut(group, lost, types)

    def _runs(self, ops: range, key: Callable[[Operation], Any]) -> Iterator[range]:
        """Cut a range of operations where the key changes; without one, at each."""
        first = ops.start
        for k in range(ops.start, ops.stop + 1):
            here = key(self.graph.ops[k]) if k < ops.stop else None
            same = first < k < ops.stop and here and here == key(self.graph.ops[first])
            if k > ops.start and not same:
                yield range(first, k)
            if not same:
                first = k

    def _gone(self, group: range) -> tuple[dict[int, Bits], set[str]]:
        """Say which sources' gradients end in an expression.

        Returns them by operation, and the dtypes of what it returns if none of that
        carries a gradient.
        """
        ops = self.graph.ops
        lost = {k: bits for k in group if (bits := self._lost(ops[k]))}
        if not lost:
            return {}, set()
        leaving = [v for k in group for v in ops[k].values if self._leaves(v, group)]
        # An integer may go on beside what has a gradient, as in top_k.
        for exact in (False, True):
            ends = [v for v in leaving if self._carries(v) is not exact]
            ended = self._ended_before(ends, group)
            gone = {k: bits & ended.get(k, 0) for k, bits in lost.items()}
            gone = {k: bits for k, bits in gone.items() if bits}
            if gone:
                types = {str(self.graph.avals[v].dtype) for v in ends}
                return gone, types if exact else set()
        return {}, set()

    def _ended_before(self, ends: list[Node], group: range) -> dict[int, Bits]:
        """Say which sources have ended where an operation of an expression returns.

        Of those that do not leave by one of the values in `ends`, on the way to it.
        """
        graph, found = self.graph, dict[int, Bits]()
        waiting = [(v, self.value[v]) for v in ends]
        seen = dict[Node, Bits]()
        while waiting:
            value, bits = waiting.pop()
            number = graph.maker[value]
            bits &= self.value[value] & ~self.tangent[value] & ~seen.get(value, 0)
            if bits and number in group:
                seen[value] = seen.get(value, 0) | bits
                found[number] = found.get(number, 0) | bits
                waiting += ((s, bits) for s in graph.feeds[value])
        return found

    def _in_library(self, group: range, lost: dict[int, Bits]) -> Iterator[Cut]:
        """Yield the cuts in a call of another library: its own expressions."""
        gone, told = _union(lost.values()), 0
        for part in self._runs(group, lambda op: op.path.innermost):
            here, types = self._gone(part)
            here = {k: bits & gone for k, bits in here.items() if bits & gone}
            if here:
                told |= _union(here.values())
                yield self._cut(group, here, types)
        rest = {k: bits & ~told for k, bits in lost.items() if bits & ~told}
        if rest:  # no expression of it alone ends the gradient
            yield self._cut(group, rest, set())

    def _cut(self, group: range, lost: dict[int, Bits], types: set[str]) -> Cut:
        """Make the cut that the operations in `lost` are, of an expression."""
        ops, first = self.graph.ops, min(lost)
        ends = [ops[k] for k in sorted(lost)]
        bits, path, edit = _union(lost.values()), ops[first].path, ""
        partly = any(self.tangent[v] & bits for op in ends for v in op.values)
        reason, words, brief = why(ends, types, self.graph, partly)
        if reason == "stop_gradient" and (edit := self._edited(ops[first])):
            words, brief = _words.STOPPED_BY_EDIT.format(address=edit), "by an edit"
        return Cut(reason, words, brief, first, group, bits, path, edit)

    def _edited(self, op: Operation) -> str:
        """Return the address of the edit that returned what an operation makes."""
        readers = [r for v in op.values for r in self.graph.readers[v]]
        marks = (_jax.edited_at(self.graph.ops[r].eqn) for r in readers)
        return next(filter(None, marks), "")

    def _carries(self, value: Node) -> bool:
        return _jax.is_differentiable(self.graph.avals[value])

    def _leaves(self, value: Node, group: range) -> bool:
        """Whether a value is used outside of an expression."""
        readers = (r for r in self.graph.readers[value] if r not in group)
        outside = any(any(map(self._is_used, self._made(r))) for r in readers)
        return self._is_used(value) and (outside or value in self._ends)

    def _made(self, number: int) -> list[Node]:
        return self.graph.ops[number].values

    def _is_used(self, value: Node) -> bool:
        return bool(self.used[value]) and hasattr(self.graph.avals[value], "dtype")

    @functools.cached_property
    def _ends(self) -> set[Node]:
        return set(self.sinks)

    def _lost(self, op: Operation) -> Bits:
        """Sources whose gradient would come to an operation and does not leave it."""
        used = [v for v in op.values if self._is_used(v)]
        # A joint reads what decides, too: that ends at the comparison which made it.
        if not used or op.join:
            return 0
        lost = self._lost_in(used, op)
        if lost and is_own_stop(op.eqn) and not op.overwrites:
            # The gate tells what a `with_backward` passes by.
            around = self._around_gates.get(tuple(op.path.spots), 0)
            return 0 if is_handed(op.eqn) else lost & ~around
        return lost

    def _lost_in(self, used: list[Node], op: Operation) -> Bits:
        """Sources that come to an operation, and do not leave it by some result."""
        graph = self.graph
        if op.overwrites:
            left = self.reached(self.tangent, used)
            return self.reached(self.tangent, graph.feeds[used[0]]) & ~left
        come = ((v, self.reached(self.tangent, graph.feeds[v])) for v in used)
        return _union(bits & ~self.tangent[v] for v, bits in come)

    @functools.cached_property
    def _around_gates(self) -> dict[Any, Bits]:
        """The sources that a gate hands on, by the path of the call that has it."""
        found: dict[Any, Bits] = {}
        for op in self.graph.ops:
            if _jax.gate_name(op.eqn):
                key = tuple(op.path.spots)
                found[key] = found.get(key, 0) | self.reached(self.tangent, op.values)
        return found


def _union(bits: Iterable[Bits]) -> Bits:
    return functools.reduce(int.__or__, bits, 0)


def why(
    ops: Sequence[Operation], exact: set[str], graph: Graph, partly: bool
) -> tuple[str, str, str]:
    """Return the reason for which a gradient ends in an expression, and its words.

    Args:
      ops: the operations at which it ends.
      exact: the dtypes of what the expression returns, if none carries a gradient.
      graph: what they are of.
      partly: whether it goes on by another one of their results.
    """
    op = ops[0]
    if op.held:
        return "held", _words.HELD, _words.HELD
    if op.overwrites:
        return "overwritten", _words.OVERWRITTEN, "overwrites it"
    if op.path.sampler:
        return "sampled", _words.SAMPLED.format(name=callee_of(op)), "sampled"
    if exact:
        return _exact(op, ", ".join(sorted(exact)), graph)
    # A stop or a rule that somebody wrote says more than a derivative that is zero.
    for op in ops:
        if _jax.kind_of(op.eqn) == "stop_gradient":
            if is_straight_through(op.eqn):
                words = _words.VALUE_ALONE.format(name="straight_through")
                return "stop_gradient", words, ""
            return "stop_gradient", _words.STOPPED, ""
        if _jax.kind_of(op.eqn) in _jax.CUSTOM:
            at = printed_place(_jax.rule_site(op.eqn))
            words = _words.RULE_RETURNS_ZERO.format(name=_jax.call_name(op.eqn))
            words += _words.FOR_SOME if partly else ""
            words += f" ({at})" if at else ""
            return "zero_rule", words, "its rule returns zero"
        if rule := _jax.gate_name(op.eqn):
            if rule == "with_backward":
                words = _words.BACKWARD_RETURNS_NONE
                return "zero_rule", words, "backward returns None or zeros"
            if rule == "transform_gradient":
                words = _words.TRANSFORMED_TO_ZERO.format(name=rule)
                return "zero_rule", words, "returns zeros"
            return "zero_rule", _words.VALUE_ALONE.format(name=rule), ""
    return "zero_derivative", *zero(ops, graph)


def _exact(op: Operation, types: str, graph: Graph) -> tuple[str, str, str]:
    """Words for what returns integers or booleans."""
    spot, brief = op.path.innermost, f"returns {types}"
    if op.is_derived:  # the function that was called may return floats
        return "comparison" if types == "bool" else "integer", *zero([op], graph)
    if types == "bool":
        compares = spot is None or not spot.callee
        words = _words.COMPARED if compares else _words.RETURNS_BOOL
        return "comparison", words.format(name=callee_of(op)), brief
    words = _words.RETURNS_INTEGERS if "int" in types else _words.RETURNS_OTHER
    return "integer", words.format(name=callee_of(op), types=types), brief
