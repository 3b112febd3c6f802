"""What a loss is a sum of: the columns of the table, each with the name it has.

From the output backwards, as long as an operation is linear in what is differentiated:
sums part, and means, weights and casts are passed. A part that was given to a variable
is named by it, any other one by its expression in the source. A part that is computed
from what is differentiated and trains none of it is a column too: it says "cut".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._reach.cuts import Analysis
from stopgrad_jax._reach.graph import Graph, Node, Operation
from stopgrad_jax._reach.linear import is_linear
from stopgrad_jax._source.labels import Spot
from stopgrad_jax._source.text import is_within

_COLUMNS = 8  # at most
_LONGEST = 32  # characters of an expression
_ADDS = {"add", "sub", "add_any"}


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of a sum: its value, its name, and whether a variable gave it."""

    value: Node
    label: str
    named: bool
    site: Any


def terms(
    analysis: Analysis, sink: Node, inputs: dict[Node, str]
) -> list[tuple[str, list[Node]]]:
    """Return the parts of an output, by name; none if it is no sum of several.

    `inputs` holds the paths of what is differentiated by.
    """
    graph = analysis.graph
    if not analysis.tangent[sink]:
        return []
    parts = _told_apart(graph, list(_Sum(analysis, inputs).parts(sink)))
    shape = graph.avals[sink].shape

    def is_alike(part: Term) -> bool:
        return part.named and graph.avals[part.value].shape == shape

    parts = [
        part
        for part in parts
        if analysis.tangent[part.value]
        or ((not shape or is_alike(part)) and not _is_of_another(graph, part, parts))
    ]
    alike = all(map(is_alike, parts))
    if not parts[1:] or (shape and not alike) or not _independent(analysis, parts):
        return []
    out: dict[str, list[Node]] = {}
    sites: dict[str, Any] = {}
    for part in parts:
        label = part.label
        while label in out and sites[label] != part.site:
            label += "'"
        sites[label] = part.site
        out.setdefault(label, []).append(part.value)
    return list(out.items()) if 1 < len(out) <= _COLUMNS else []


class _Sum:
    def __init__(self, analysis: Analysis, inputs: dict[Node, str]) -> None:
        self._analysis, self._graph = analysis, analysis.graph
        self._inputs = inputs
        self._linear: dict[Operation, bool] = {}

    def parts(self, sink: Node) -> Iterator[Term]:
        """Yield the parts of the output; itself, if it is no sum."""
        yield from self._parts(sink, None, frozenset())

    def _parts(
        self, value: Node, reader: Operation | None, sums: frozenset[str]
    ) -> Iterator[Term]:
        """Yield the parts of a value that `reader` adds up.

        `sums` holds the names of the sum itself, as in `loss += ...`.
        """
        value = self._uncast(value, reader)
        end, after, names = value, reader, set(sums)
        while True:
            name = self._name(end, after)
            if reader is not None and name and name[0] not in sums:
                yield Term(end, name[0], True, name[1])
                return
            names |= {name[0]} if name else set()
            operands = self._summands(end)
            if not operands:
                yield self._whole(value, reader)
                return
            after = self._maker(end)
            if end == value and after is not None and after.eqn.primitive.name == "add":
                value = operands[0]  # `loss = 0.0; loss = loss + ...`: nothing is added
            if operands[1:]:
                break
            (end,) = operands
        for operand in operands:
            yield from self._parts(operand, after, frozenset(names))

    def _uncast(self, value: Node, reader: Operation | None) -> Node:
        """Return what a sum is given, before it casts it to its own type."""
        op = self._maker(value)
        while op is not None and reader is not None:
            own, other = op.spot, reader.spot
            cast = op.eqn.primitive.name == "convert_element_type" and not op.join
            (source,) = op.inputs if cast else (None,)
            if source is None or own is None or other is None:
                break
            if own.position != other.position or own.frame.code is not other.frame.code:
                break
            value, op = source, self._maker(source)
        return value

    def _side(self, value: Node, reader: Operation) -> int:
        """Tell which of two operands a value is to its reader; -1 if it has not two."""
        read = [None if x is None else self._uncast(x, reader) for x in reader.inputs]
        return read.index(self._uncast(value, reader)) if len(read) == 2 else -1

    def _maker(self, value: Node) -> Operation | None:
        number = self._graph.maker[self._graph.original(value)]
        return None if number < 0 else self._graph.ops[number]

    def _summands(self, value: Node) -> list[Node]:
        """Return what a value is a sum of: none where it is not linear in it."""
        op, value = self._maker(value), self._graph.original(value)
        if op is None or op.join or op.held:
            return []
        passive = not self._analysis.tangent[value]
        if passive and op.eqn.primitive.name == "convert_element_type":
            return [v for v in op.inputs if v is not None]
        moved = self._moved(op, value)
        operands = list(dict.fromkeys(op.inputs[k] for k in moved))
        shapes = [self._graph.avals[v].shape for v in operands if v is not None]
        # A bias is no part of a loss, nor is what is broadcast to the others.
        bias = any(
            v in self._inputs and s for v, s in zip(operands, shapes, strict=True)
        )
        if operands[1:] and (bias or len({len(s) for s in shapes}) > 1):
            return []
        linear = self._is_linear(op, moved)
        return [v for v in operands if v is not None] if linear else []

    def _moved(self, op: Operation, value: Node) -> list[int]:
        """Return which operands make a value move; of a part that is cut, change it."""
        analysis, graph = self._analysis, self._graph
        pairs = [(k, v) for k, v in enumerate(op.inputs) if v is not None]
        reached = [(k, v) for k, v in pairs if analysis.value[v]]
        if analysis.tangent[value] and op.eqn.primitive.name not in _ADDS:
            grads = graph.grads[value]
            return [k for k, v in reached if analysis.tangent[v] and v in grads]
        floats = _jax.is_differentiable
        return [
            k for k, v in reached if floats(graph.avals[v]) and v in graph.feeds[value]
        ]

    def _is_linear(self, op: Operation, moved: list[int]) -> bool:
        """Tell whether an operation is linear in operands; in all, so it is in each.

        One that hands a whole tree on is asked for all of it at once.
        """
        if len(op.eqn.outvars) > 1:
            if op not in self._linear:
                moving = self._analysis.tangent
                pairs = enumerate(op.inputs)
                every = [k for k, v in pairs if v is not None and moving[v]]
                self._linear[op] = is_linear(op.eqn, every)
            if self._linear[op]:
                return True
        return is_linear(op.eqn, moved)

    def _whole(self, value: Node, reader: Operation | None) -> Term:
        """A part that no variable has: named by its expression."""
        op = self._maker(value)
        if op is None:
            path = self._inputs.get(value) or self._inputs.get(
                self._graph.original(value), ""
            )
            return Term(value, path, True, path)
        spot = _apart(op, reader) or op.spot
        text = spot.expression if spot else op.name
        if spot and _is_pulled(op, spot):
            text = self._read(value, reader) or text
        return Term(value, _shortened(text) or op.name, False, spot or op.name)

    def _name(self, value: Node, reader: Operation | None) -> tuple[str, Any] | None:
        """Return the variable or the point that a value is, and where that is."""
        op = self._maker(value)
        if op is None:
            return None
        if op.join:
            return _of_join(op)
        if _jax.kind_of(op.eqn) == "name":
            return _jax.params_of(op.eqn)["name"], _jax.params_of(op.eqn)["name"]
        spot, other = _apart(op, reader), _apart(reader, op) if reader else None
        statement = spot.statement if spot else None
        if spot is not None and _is_pulled(op, spot):
            read = self._read(value, reader)
            return (read, read) if read.isidentifier() else None
        if spot is None or statement is None or statement.kind != "assignment":
            return None
        if other is not None and other.statement == statement:
            return None
        targets = statement.targets
        if statement.parts:
            pairs = zip(targets, statement.parts, strict=True)
            targets = [t for t, place in pairs if is_within(spot.position, place)]
        if other is not None and reader is not None and other.is_current:
            side = self._side(value, reader)
            read = spot.source.read_of(targets, other.position, side)
            if read:
                return read, (statement.line, read)
        key = spot.source.key(spot.position)
        if key:
            return key, spot.position
        if statement.parts:
            return (targets[0], spot.position) if len(targets) == 1 else None
        if len(statement.targets) > 1:
            return _returned_name(op, spot)
        return statement.label, (statement.line, statement.label)

    def _read(self, value: Node, reader: Operation | None) -> str:
        """Return what the reader's expression spells a value as, or ""."""
        spot = reader.spot if reader else None
        if reader is None or spot is None or not spot.is_current:
            return ""
        side = self._side(value, reader)
        return spot.source.operand(spot.position, side)


def _is_pulled(op: Operation, spot: Spot) -> bool:
    """Tell what a function made that `jax.vjp` or the like returned there.

    Its place is where that was called, not where the function is.
    """
    eqns = (op.eqn, *op.within)
    return any(spot.frame.code in _jax.linearized_in(eqn) for eqn in eqns)


def _told_apart(graph: Graph, parts: Sequence[Term]) -> list[Term]:
    """Name what came out of one container by where in it each part was made."""
    groups: dict[Any, list[Term]] = {}
    for part in parts:
        groups.setdefault((part.label, part.site), []).append(part)
    out = []
    for part in parts:
        made = [_spots(graph, p) for p in groups[part.label, part.site]]
        own = _spots(graph, part)
        depth = 0
        while depth < min(map(len, made)) and len({p[depth] for p in made}) == 1:
            depth += 1
        if all(other == own for other in made) or depth >= len(own):
            out.append(part)
            continue
        label, site = _made_as(own[depth])
        out.append(dataclasses.replace(part, label=label, site=site))
    return out


def _spots(graph: Graph, part: Term) -> tuple[Spot, ...]:
    number = graph.maker[part.value]
    return () if number < 0 else graph.ops[number].path.spots


def _made_as(spot: Spot) -> tuple[str, Any]:
    """Name one entry of a container, by what its author called it there."""
    statement, key = spot.statement, spot.source.key(spot.position)
    label = key or _shortened(spot.expression)
    if statement and statement.kind == "assignment" and len(statement.targets) == 1:
        whole = statement.value == spot.position
        label = statement.label if whole else label
    return label, spot.position


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _apart(op: Operation | None, other: Operation | None) -> Spot | None:
    """Return the expression of `op` in the function where the two paths part."""
    if op is None or not op.path.spots:
        return None
    mine, its = op.path.spots, other.path.spots if other else ()
    depth = 0
    while depth < min(len(mine), len(its)) - 1 and mine[depth] is its[depth]:
        depth += 1
    same = depth < len(its) and mine[depth].frame.code is its[depth].frame.code
    return mine[depth] if same or other is None else mine[0]


def _of_join(op: Operation) -> tuple[str, Any] | None:
    """Name what a branch or a loop returns, if it is assigned as it is."""
    spot = op.spot
    statement = spot.statement if spot else None
    if spot is None or statement is None or statement.kind != "assignment":
        return None
    if statement.value != spot.position or len(statement.targets) != 1:
        return None
    return statement.label, (statement.line, statement.label)


def _returned_name(op: Operation, spot: Spot) -> tuple[str, Any] | None:
    """Of `a, b = f(x)`: the name that f itself has for the part."""
    depth = op.path.spots.index(spot) + 1
    for inner in op.path.spots[depth : depth + 1]:
        statement = inner.statement
        if statement is not None and statement.kind == "assignment":
            return statement.label, (statement.line, statement.label)
        if inner.expression:
            return inner.expression[:_LONGEST], inner.position
    return None


def _is_of_another(graph: Graph, part: Term, parts: Sequence[Term]) -> bool:
    """Tell whether a part is another one's value, as in `x + stop_gradient(q - x)`."""
    before = graph.backward([part.value], graph.feeds)
    return any(before[p.value] for p in parts if p.value != part.value)


def _independent(analysis: Analysis, parts: Sequence[Term]) -> bool:
    """Tell whether none of the parts is computed from another one."""
    graph, values = analysis.graph, {part.value for part in parts}
    if len(values) < 2:
        return False
    first = min(values)
    for value in values:
        before = graph.backward([value], graph.grads)
        if any(before[other] for other in values if first <= other != value):
            return False
    return True
