"""From equations to the user's statements: which operation belongs to which step.

A step is a statement of the function that is looked at. A call in it stays folded,
unless a gradient ends or changes inside: then its own statements are steps, in a box.
An expression at which a gradient ends or changes is a step of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._places import printed_place
from stopgrad_jax._reach.cuts import Analysis, Cut
from stopgrad_jax._reach.graph import Operation
from stopgrad_jax._source.labels import Labels, Path, Spot
from stopgrad_jax._source.text import Statement

Prefix = tuple[Spot, ...]


@dataclasses.dataclass(frozen=True)
class Special:
    """An expression that is a step of its own: a cut, a gate, a rule, a name."""

    kind: str
    path: Path
    label: str
    detail: str
    cut: Cut | None = None


@dataclasses.dataclass
class Group:
    """The operations of one step."""

    prefix: Prefix
    spot: Spot | None
    ops: list[int] = dataclasses.field(default_factory=list)
    special: Special | None = None

    @property
    def statement(self) -> Statement | None:
        """The statement it is, or is in."""
        return self.spot.statement if self.spot else None


class Grouping:
    """Assigns each operation that the sinks use to a group, in program order.

    `group_of[k]` is the number of the group of operation k, or -1.
    """

    def __init__(
        self, analysis: Analysis, labels: Labels, cuts: Iterable[Cut], internals: bool
    ) -> None:
        """Group by statement; calls with a special in them are open."""
        self.analysis = analysis
        graph = analysis.graph
        self._used = [any(analysis.used[v] for v in op.values) for op in graph.ops]
        self.root = self._root()
        self.specials = list(_specials(analysis, self._used, labels, cuts))
        self._opened = self._open(internals)
        self._parts: dict[Any, list[tuple[Spot, Special]]] = {}
        for special in self.specials:
            if special.path.spots[self.root :]:
                prefix, spot = self.place(special.path)
                if len(special.path.spots) == len(prefix) + 1:
                    key = _statement_key(prefix, spot)
                    self._parts.setdefault(key, []).append((spot, special))
        self.groups: list[Group] = []
        self.group_of = [-1] * len(graph.ops)
        self._assign()

    def place(self, path: Path) -> tuple[Prefix, Spot]:
        """Return the open calls around a path, and the expression in the innermost."""
        spots, depth = path.spots, self.root
        while depth < len(spots) - 1 and spots[: depth + 1] in self._opened:
            depth += 1
        return spots[:depth], spots[depth]

    def _root(self) -> int:
        """How many calls all operations have in common: wrappers of the function."""
        ops = self.analysis.graph.ops
        paths = {op.path.spots for k, op in enumerate(ops) if self._used[k]} - {()}
        if not paths:
            return 0
        first, shortest = next(iter(paths)), min(map(len, paths))
        depth = 0
        while depth < shortest - 1 and all(p[depth] is first[depth] for p in paths):
            depth += 1
        return depth

    def _open(self, internals: bool) -> set[Prefix]:
        paths = [s.path for s in self.specials if s.kind != "name"]
        if internals:
            paths = [op.path for op in self.analysis.graph.ops]
        spots = {path.spots for path in paths}
        return {s[:k] for s in spots for k in range(self.root + 1, len(s))}

    def _assign(self) -> None:
        numbers: dict[Any, int] = {}
        places: dict[int, tuple[Any, Any]] = {}
        for k, op in enumerate(self.analysis.graph.ops):
            if not self._used[k]:
                continue
            # Most operations share their path with others: each path is placed once.
            if id(op.path) not in places:
                places[id(op.path)] = self._key(op.path)
            key, group = places[id(op.path)]
            if not op.path.spots[self.root :]:  # no source at all: by operation
                key = op.name
            if key not in numbers:
                numbers[key] = len(self.groups)
                self.groups.append(
                    Group(group.prefix, group.spot, special=group.special)
                )
            self.group_of[k] = numbers[key]
            self.groups[numbers[key]].ops.append(k)

    def _key(self, path: Path) -> tuple[Any, Group]:
        """Return what tells the step of a path apart, and that step, still empty."""
        if not path.spots[self.root :]:
            return None, Group((), None)
        prefix, spot = self.place(path)
        key = _statement_key(prefix, spot)
        inside = [
            (part, special)
            for part, special in self._parts.get(key, ())
            if part.holds(spot)
        ]
        if not inside:
            return key, Group(prefix, spot)
        # One may hold another, as `stop_gradient(jnp.round(x))` does: it is the inner
        # one's.
        part, special = min(inside, key=lambda pair: _extent(pair[0]))
        if spot.statement is not None and spot.statement.value == part.position:
            return key, Group(prefix, part, special=special)
        return (*key, part), Group(prefix, part, special=special)


def _statement_key(prefix: Prefix, spot: Spot) -> tuple[Any, ...]:
    statement = spot.statement
    if statement is None:
        where: Any = spot.frame.line
    else:
        where = (statement.line, statement.label, statement.value)
    return (prefix, spot.frame.file, spot.function, where)


def _extent(spot: Spot) -> tuple[int, int]:
    line, col, end_line, end_col = spot.position
    return end_line - line, end_col - col


def _specials(
    analysis: Analysis, used: Sequence[bool], labels: Labels, cuts: Iterable[Cut]
) -> Iterable[Special]:
    for cut in cuts:
        yield Special(
            "cut", cut.path, _called(analysis.graph.ops[cut.op]), cut.words, cut
        )
    named = dict[Path, list[str]]()  # of a tree that is named as a whole, its own name
    for op in analysis.graph.ops:
        if _jax.kind_of(op.eqn) == "name":
            parts = str(_jax.params_of(op.eqn)["name"]).split("/")
            pairs = zip(named.get(op.path, parts), parts, strict=False)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            named[op.path] = [one for one, _ in same] or parts
    for k, op in enumerate(analysis.graph.ops):
        if not used[k] or op.join or not op.path.spots:
            continue
        flows = any(analysis.tangent[v] and analysis.arrives[v] for v in op.values)
        primitive = _jax.kind_of(op.eqn)
        if primitive == "name" and not op.path.library:
            yield Special("name", op.path, "/".join(named[op.path]), "")
        elif (name := _jax.gate_name(op.eqn)) and flows:
            if name in ("with_backward", "replace_value", "straight_through"):
                yield Special("replace", op.path, _called(op), f"rule: {name}")
            elif name != "per_example":
                detail = " ".join([name, *_number(op)])
                yield Special("gate", op.path, _called(op), detail)
        elif primitive in _jax.CUSTOM and flows:
            place = _jax.rule_site(op.eqn)
            if not _jax.is_own(place) and labels.is_users(place.rpartition(":")[0]):
                detail = f"rule: {printed_place(place)}"
                yield Special("replace", op.path, _called(op), detail)


def _called(op: Operation) -> str:
    operator = op.spot and not op.spot.callee and op.spot.expression
    return operator[:40] if operator else op.name


def _number(op: Operation) -> list[str]:
    """The gate's parameters that are constants of the program."""
    values = [v.val for v in op.eqn.invars if isinstance(v, _jax.Literal)]
    return [f"{float(v):g}" for v in values if getattr(v, "size", 1) == 1]
