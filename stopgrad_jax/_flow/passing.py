"""What to write for an expression at which a gradient ends, so that one passes."""

from __future__ import annotations

import ast
import collections
import functools
from collections.abc import Sequence

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._address import Op
from stopgrad_jax._errors import AddressError
from stopgrad_jax._reach.cuts import Cut
from stopgrad_jax._reach.graph import Graph
from stopgrad_jax._reach.naming import FLAT_KINDS
from stopgrad_jax._source.labels import Path
from stopgrad_jax._source.written import (
    Written,
    is_constant,
    names_in,
    replaced,
    written,
)

from .analysis import Look

_Key = tuple[int, Path, int]
_UNARY = ("round", "rint", "around", "floor", "ceil", "sign", "trunc")
_BINARY = ("floor_divide", "floordiv")


class Passing:
    """Knows to what a gradient would come back if it passed, in what a look is at."""

    def __init__(self, look: Look) -> None:
        """Ask nothing yet."""
        self._look = look

    def straight_through(self, bits: int, cut: Cut) -> str:
        """Return a straight-through expression in the place of that of a cut, or "".

        It can be pasted there: its value is the same, and the gradient of the inputs
        that `bits` stand for comes to the outputs through it.
        """
        spot = cut.spot
        known = cut.reason == "zero_derivative" and cut.brief == _words.ZERO_BRIEF
        if spot is None or cut.path.inside is not None or not known:
            return ""
        function = written(spot)
        node = function.expression(spot) if function else None
        call = _rewritten(node, function) if node and function else ""
        return call if call and self._passes(bits, cut) else ""

    def _passes(self, bits: int, cut: Cut) -> bool:
        """Tell whether nothing ends a gradient behind the cut as well.

        Where the expression was run for integers, too, it would be refused.
        """
        graph, value = self._look.graph, self._look.analysis.value
        same = (op for op in graph.ops if op.spot is cut.spot)
        flat = (op for op in same if _jax.kind_of(op.eqn) in FLAT_KINDS)
        made = (graph.avals[v] for op in flat for v in op.values)
        if not all(map(_jax.is_differentiable, made)):
            return False
        keys = _keys(graph)
        return any(
            keys[k] in self._arrives
            for k in cut.ops
            if any(value[v] & bits for v in graph.ops[k].values)
        )

    @functools.cached_property
    def _arrives(self) -> set[_Key]:
        """The operations of these kinds that a gradient of the outputs comes back to.

        Rules are only asked about what moves: so their results are differentiated by.
        """
        look = self._look
        try:
            by_result = Look(
                look.traced, look.labels, [Op(FLAT_KINDS)], look.ys, look.called
            )
        except AddressError:
            return set()
        graph, tangent = by_result.graph, by_result.analysis.tangent
        results = (leaf for leaf in by_result.leaves if leaf.bit)
        made = ((x.bit, graph.maker[graph.original(x.value)]) for x in results)
        makers = {bit: k for bit, k in made if k >= 0}
        found = {bit for bit in makers if by_result.verdict(bit) == "flows"}
        ends = list(found)
        for end in ends:  # what runs again is mended there, too
            op = graph.ops[makers[end]]
            before = {s for v in op.values for s in graph.feeds[v]}
            for bit in makers.keys() - found:
                same = graph.ops[makers[bit]].path == op.path
                if same and any(tangent[s] & bit for s in before):
                    found.add(bit)
                    ends.append(bit)
        keys = _keys(graph)
        return {keys[makers[bit]] for bit in found}


def _keys(graph: Graph) -> list[_Key]:
    """Tell the operations of a program apart, alike in each graph of it.

    JAX keeps what it traced of a jitted function: two calls have the same equations.
    """
    keys, times = list[_Key](), collections.Counter[tuple[int, Path]]()
    for op in graph.ops:
        same = id(op.eqn), op.path
        keys.append((*same, times[same]))
        times[same] += 1
    return keys


def _rewritten(node: ast.expr, function: Written) -> str:
    """Write an expression anew, if it is one of few whose operand is known."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return _of_two(node, [node.left, node.right], "")
    if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
        return ""
    if any(isinstance(x, ast.Starred) for x in node.args):
        return ""
    called, arguments = ast.unparse(node.func), node.args
    name = called.rpartition(".")[2]
    if name in _BINARY and len(arguments) == 2 and not node.keywords:
        return _of_two(node, arguments, called)
    if name not in _UNARY:
        return ""
    receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
    if name == "round" and receiver is not None:  # an array's method has this name
        given = [*arguments, *(k.value for k in node.keywords)]
        named = {k.arg for k in node.keywords} <= {"decimals"}
        if named and all(map(is_constant, given)):
            return _of_operand(node, receiver)
        if not function.is_module(receiver):
            return ""
    if not arguments or is_constant(arguments[0]):
        return ""
    given = ", ".join(map(ast.unparse, [*arguments, *node.keywords]))
    return f"sg.straight_through({called})({given})"


def _of_two(node: ast.expr, operands: Sequence[ast.expr], called: str) -> str:
    """Write a division by a number, or of one; which of two arrays learns is open."""
    variable = [x for x in operands if not is_constant(x)]
    if len(variable) != 1:
        return ""
    if called and variable[0] is operands[0]:
        return f"sg.straight_through({called})({', '.join(map(ast.unparse, operands))})"
    return _of_operand(node, variable[0])


def _of_operand(node: ast.expr, operand: ast.expr) -> str:
    """Write an expression as a function of one operand; the others are numbers."""
    text = ast.unparse(operand)
    rest = names_in(node) - names_in(operand)
    names = [text if isinstance(operand, ast.Name) else "x", "x", "y", "z"]
    name = next((n for n in names if n not in rest), "")
    inside = replaced(node, operand, name) if name else ""
    return f"sg.straight_through(lambda {name}: {inside})({text})" if name else ""
