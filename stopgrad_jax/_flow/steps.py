"""From groups of operations to steps, edges and boxes: what is drawn and printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import type_of
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.cuts import Analysis, Cut
from stopgrad_jax._reach.graph import Node, Operation
from stopgrad_jax._reach.naming import callee_of
from stopgrad_jax._source.labels import Path, Spot
from stopgrad_jax._source.repeats import Again, is_again

from .grouping import Group, Grouping, Prefix
from .model import STATUSES, Box, Edge, Site, Step


@dataclasses.dataclass(frozen=True)
class Row:
    """An input as it is shown: a subtree whose leaves all fare alike."""

    path: str
    type: str
    values: tuple[Node, ...]
    data: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """The steps of a flow and how they hang together.

    `step_of[v]` is the step that makes value v, or -1; `rows[i]` is step i.
    """

    steps: tuple[Step, ...]
    edges: tuple[Edge, ...]
    boxes: tuple[Box, ...]
    step_of: Sequence[int]
    groups: Sequence[Group]
    first: int  # the number of the first group's step


def site_of(spot: Spot, origin: str = "user") -> Site:
    """Return where an expression is, in plain values."""
    line, col, end_line, end_col = spot.position
    source = spot.source
    return Site(
        spot.file,
        line,
        source.column(line, col),
        end_line,
        source.column(end_line, end_col),
        spot.function,
        spot.expression,
        origin,
    )


def lay_out(
    analysis: Analysis,
    grouping: Grouping,
    rows: Sequence[Row],
    outputs: Sequence[tuple[str, Sequence[Node]]],
) -> Layout:
    """Make the steps of inputs, groups and outputs, and the edges between them."""
    graph, groups = analysis.graph, grouping.groups
    step_of = [-1] * len(graph.maker)
    for number, row in enumerate(rows):
        for value in row.values:
            step_of[value] = number
    for k, op in enumerate(graph.ops):
        if grouping.group_of[k] >= 0:
            for value in op.values:
                step_of[value] = len(rows) + grouping.group_of[k]
    boxes = _Boxes()
    steps = [_input(k, row, analysis) for k, row in enumerate(rows)]
    for group in groups:
        steps.append(_step(len(steps), group, analysis, grouping, boxes))
    edges = _edges(analysis, grouping, steps, step_of)
    for label, values in outputs:
        number = len(steps)
        kinds = dict.fromkeys(type_of(graph.avals[v]) for v in values)
        steps.append(Step(number, "output", label, ", ".join(kinds), flows=True))
        for value in values:
            if step_of[value] >= 0:
                status = "flow" if analysis.tangent[value] else "value"
                edges.setdefault((step_of[value], number), status)
    drawn = tuple(Edge(a, b, status) for (a, b), status in edges.items())
    return Layout(tuple(steps), drawn, tuple(boxes.made), step_of, groups, len(rows))


def _input(number: int, row: Row, analysis: Analysis) -> Step:
    flows = any(analysis.arrives[v] and analysis.tangent[v] for v in row.values)
    return Step(number, "input", row.path, row.type, flows=flows, data=row.data)


class _Boxes:
    def __init__(self) -> None:
        self.made: list[Box] = []
        self._known: dict[Any, int] = {}

    def inside(self, path: Prefix, group: Group, outside: int) -> int | None:
        """Return the number of the box of a group, made with those around it."""
        number = None
        for depth in range(outside + 1, len(path) + 1):
            inner = path[depth] if depth < len(path) else group.spot
            key = (path[:depth], inner.function if inner else "")
            if key not in self._known:
                self._known[key] = len(self.made)
                label = f"{short(inner.function)}()" if inner else ""
                site = site_of(path[depth - 1])
                self.made.append(Box(len(self.made), label, site, number))
            number = self._known[key]
        return number


def short(function: str) -> str:
    """Name a function without what it is defined in; `Net()` for `Net.__call__`."""
    parts = [part for part in function.split(".") if part != "<locals>"]
    if parts[-1] == "__call__" and len(parts) > 1:
        parts.pop()
    return parts[-1]


def _step(
    number: int, group: Group, analysis: Analysis, grouping: Grouping, boxes: _Boxes
) -> Step:
    """Describe a group: what the user calls it, what happens there, and where."""
    every = [analysis.graph.ops[k] for k in group.ops]
    # The joint at which a found value leaves a loop is not what the user wrote.
    own = [op for op in every if not op.copies] or every
    last, cut = own[-1], group.special.cut if group.special else None
    passes = (
        analysis.arrives[v] and analysis.tangent[v] for op in every for v in op.values
    )
    kind = _kind(group)
    label, detail = _label(group, grouping.root, last)
    return Step(
        id=number,
        kind=kind,
        label=label,
        type=_type(group, analysis, grouping),
        callee=_callee(group, [op.path for op in every], kind),
        detail=_detail(group, analysis, own, label) or detail,
        site=_site(group, last.path),
        repeat=_repeats(own, group) if group.statement else 1,
        box=boxes.inside(group.prefix, group, grouping.root),
        reason=cut.reason if cut else "",
        flows=any(passes),
    )


def _kind(group: Group) -> str:
    """A name changes nothing: to who reads the picture it is a step like any other."""
    special = group.special
    return special.kind if special and special.kind != "name" else "step"


def _type(group: Group, analysis: Analysis, grouping: Grouping) -> str:
    """Return the type of what leaves a group, or "" if it has several."""
    graph, mine, sinks = analysis.graph, set(group.ops), set(analysis.sinks)

    def leaves(value: Node) -> bool:
        readers = (k for k in graph.readers[value] if k not in mine)
        return value in sinks or any(grouping.group_of[k] >= 0 for k in readers)

    values = [v for k in group.ops for v in graph.ops[k].values if leaves(v)]
    avals = (graph.avals[v] for v in values)
    kinds = {type_of(aval) for aval in avals if hasattr(aval, "dtype")}
    return kinds.pop() if len(kinds) == 1 else ""


def _detail(
    group: Group, analysis: Analysis, own: Sequence[Operation], label: str
) -> str:
    """Say in a word what happens in a group, or "" where its name says it all."""
    special = group.special
    if special and special.cut:
        cut = special.cut
        return _of_cut(cut, callee_of(analysis.graph.ops[cut.op]), label)
    if special:
        return special.detail
    if not all(op.join and not op.copies for op in own):
        return ""
    inner = control(own[-1].eqn)
    branch = inner is not None and inner.decides == "branch"
    return "one of the branches" if branch else "carried by the loop"


def _repeats(ops: Sequence[Operation], group: Group) -> int:
    """Count how often a statement ran.

    As often as its last operation, if the user wrote that; another library may have
    loops of its own inside the one call.
    """
    last, spot = ops[-1], group.spot
    same = (last.path, last.eqn.primitive)
    times = [op for op in ops if (op.path, op.eqn.primitive) == same]
    if len(times) == 1 or not last.path.library or spot is None:
        return len(times)
    statement = group.statement
    value = (statement.value if statement else None) or spot.position
    count, first, before = 1, None, None
    for stack in (_jax.stack_of(op.eqn) for op in ops if not op.join):
        levels = [k for k, (code, _) in enumerate(stack) if code is spot.frame.code]
        if first is None or before is None or not levels:
            first = before = stack
        elif is_again(first, before, stack, levels[-1], value) is Again.YES:
            count, first = count + 1, stack
        before = stack
    return count


def _of_cut(cut: Cut, name: str, label: str) -> str:
    """Say in a few words what a cut is."""
    if cut.reason == "stop_gradient":
        return "on purpose" if label == name else name
    if cut.reason in ("integer", "comparison"):
        return f"{name} {cut.brief}"
    if cut.reason == "zero_derivative":
        return cut.words.removesuffix(" almost everywhere")
    return cut.brief or cut.words


def _site(group: Group, path: Path) -> Site | None:
    """The part, or the whole statement that a group is."""
    if group.spot is None:
        return None
    origin = "library" if path.library else "user"
    site, statement = site_of(group.spot, origin), group.statement
    if group.special or statement is None:
        return site
    source = group.spot.source
    last = source.rows(statement.end_line, statement.end_line)
    end = len(last[0][1]) if last else 0
    first = source.rows(statement.line, statement.line)
    start = len(first[0][1]) - len(first[0][1].lstrip()) if first else 0
    text = " ".join(
        row.strip() for _, row in source.rows(statement.line, statement.end_line)
    )
    return dataclasses.replace(
        site,
        line=statement.line,
        col=start,
        end_line=statement.end_line,
        end_col=end,
        expr=text,
    )


def _label(group: Group, root: int, last: Any) -> tuple[str, str]:
    """Name a step: by its point, its variable, or what it calls."""
    special, statement, spot = group.special, group.statement, group.spot
    assigned = variable(group, root)
    whole = (
        statement is not None
        and spot is not None
        and (special is None or statement.value == spot.position)
    )
    if special and (special.kind == "name" or not whole):
        return special.label, ""
    if spot is None or statement is None:
        return last.name, ""
    returned = statement.kind == "return" and group.prefix[root:]
    return assigned, f"returned by {short(spot.function)}()" if returned else ""


def variable(group: Group, root: int) -> str:
    """Name what a step's statement assigns; a return, what the call is assigned to."""
    statement = group.statement
    if statement is None:
        return ""
    if statement.kind == "return" and group.prefix[root:]:
        outer = group.prefix[-1]
        above = outer.statement
        if above and above.value == outer.position and above.targets:
            return above.label
        return f"{short(group.spot.function)}()" if group.spot else "return"
    return statement.label


def _callee(group: Group, paths: Sequence[Path], kind: str) -> str:
    """Name the one function that a step calls and that stays folded."""
    if kind != "step" or group.spot is None:
        return ""
    depth = len(group.prefix)
    inside = {p.spots[depth + 1].function for p in paths if len(p.spots) > depth + 1}
    if len(inside) == 1:
        return f"{short(inside.pop())}()"
    statement = group.statement
    if not inside and statement and statement.value and any(p.library for p in paths):
        name = group.spot.source.callee(statement.value)
        return f"{name}()" if name else ""
    return ""


def _edges(
    analysis: Analysis,
    grouping: Grouping,
    steps: Sequence[Step],
    step_of: Sequence[int],
) -> dict[tuple[int, int], str]:
    """Return the edges between steps, each with the first of its statuses.

    Two steps may share many values: a gradient through one of them is a gradient.
    """
    graph, out = analysis.graph, dict[tuple[int, int], str]()
    cut_ops = {s.cut.op for s in grouping.specials if s.cut}
    for k, op in enumerate(graph.ops):
        if grouping.group_of[k] < 0:
            continue
        target = step_of[op.values[0]]
        for value in filter(analysis.used.__getitem__, op.values):
            tangents = set(graph.grads[value])
            for source in graph.feeds[value]:
                origin = step_of[source]
                if origin in (-1, target):
                    continue
                status = _status(
                    analysis,
                    source,
                    value,
                    passes=source in tangents,
                    cut=k in cut_ops,
                    kind=steps[target].kind,
                )
                old = out.get((origin, target), "value")
                out[origin, target] = min(old, status, key=STATUSES.index)
    return out


def _status(
    analysis: Analysis, source: Node, value: Node, passes: bool, cut: bool, kind: str
) -> str:
    if not analysis.tangent[source]:
        return "value"
    if not passes:
        return "cut" if cut else "value"
    if analysis.arrives[value]:
        return kind if kind in ("replace", "gate") else "flow"
    return "cut" if kind == "cut" else "shadow"
