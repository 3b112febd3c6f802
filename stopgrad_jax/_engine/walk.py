"""Find where addresses match in a traced function, reading only.

`search` descends through every nested jaxpr and returns a `Plan`: for each jaxpr
that holds a match, the equations concerned and the plans of what is inside them. A
jaxpr that is called many times is searched once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Op, Point, Var, nodes, pattern, prefixes

from .nested import Copies, Nested, nested
from .variables import Variables


class PointName(str):
    """The name of one leaf of a named tree; it remembers the tree.

    `tree` is the named tree with each traced leaf replaced by its `Leaf`.
    """

    __slots__ = ("root", "tree")
    root: str
    tree: Any

    def __new__(cls, name: str, root: str, tree: Any) -> PointName:
        """Make the name of one leaf."""
        self = super().__new__(cls, name)
        self.root, self.tree = root, tree
        return self


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Stands for the traced leaf of this name in a `PointName`'s tree."""

    name: str


@dataclasses.dataclass(frozen=True)
class Hit:
    """A value is part `position` of what an address selects at this place.

    `root` is the full address that matched, `parts` the names of all the parts and
    `tree` their structure (None: one value by itself). `operation`: an edit of it is
    one of the equation, not of its results.
    """

    target: int
    root: str
    position: int = 0
    parts: tuple[str, ...] = ("",)
    tree: Any = None
    operation: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """One value that addresses select.

    `aval` is its type outside all the equations that it lies in: with the time axis of
    a scan and with all the shards. `size`: how many entries it has where it is.
    `copies`: how many of it there are for the scans and shard_maps that it lies in,
    outermost first. `rule`: it is behind a custom rule. `dynamic`: it is in a while
    loop. `differentiated`: a derivative of it has already been taken.
    """

    name: str
    hits: tuple[Hit, ...]
    aval: Any
    line: str
    rule: bool = False
    dynamic: bool = False
    differentiated: bool = False
    size: int = 0
    copies: tuple[Copies, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Lengths of the scans that it lies in, outermost first."""
        return tuple(c.count for c in self.copies if not c.devices)

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the addresses that select this value."""
        return tuple(hit.target for hit in self.hits)


@dataclasses.dataclass(frozen=True)
class Match:
    """An equation that something happens to: to its results, or inside it."""

    index: int
    eqn: Any
    own: tuple[Found, ...]  # one for each result, or none
    plans: tuple[Plan, ...]  # one for each body, or none
    inside: tuple[Found, ...]  # what the plans found, seen from outside


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A jaxpr and what was found in it, in program order."""

    jaxpr: Any
    consts: Sequence[Any]
    matches: tuple[Match, ...]
    found: tuple[Found, ...]


@dataclasses.dataclass(frozen=True)
class _Context:
    ops: frozenset[int]  # the ops still looked for here
    scopes: frozenset[str] = frozenset()
    rule: bool = False
    dynamic: bool = False
    differentiated: bool = False


class Search:
    """Look for `targets`, and remember every name on the way for error messages.

    `hidden` maps a target to the line of a match in the body of a custom rule, where
    operations are not looked for. `opaque` maps primitives that hold a program which
    cannot be searched to a line, `unreachable` wanted names in them to where that is.
    `fun` is the function searched, `anywhere` see `Variables`.
    """

    def __init__(
        self,
        targets: Sequence[Point | Op | Var],
        fun: Any = None,
        anywhere: frozenset[int] = frozenset(),
    ) -> None:
        self.targets = targets
        self.names: dict[str, None] = {}
        self.ops: dict[str, None] = {}
        self.hidden: dict[int, str] = {}
        self.opaque: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        self._points = [
            (k, pattern(target.name))
            for k, target in enumerate(targets)
            if isinstance(target, Point)
        ]
        self._ops = [(k, op) for k, op in enumerate(targets) if isinstance(op, Op)]
        # Labels read the whole stack of every equation: only where they are needed.
        names = {k: var for k, var in enumerate(targets) if isinstance(var, Var)}
        self.variables = Variables(names, fun, anywhere) if names else None
        self._scoped = any(op.within for _, op in self._ops)
        self._plans: dict[Any, Plan] = {}

    def plan(self, jaxpr: Any, consts: Sequence[Any]) -> Plan:
        """Search a whole program."""
        return self._plan(jaxpr, consts, _Context(frozenset(k for k, _ in self._ops)))

    def _plan(self, jaxpr: Any, consts: Sequence[Any], context: _Context) -> Plan:
        key = (id(jaxpr), context)
        if key not in self._plans:
            matches = tuple(self._matches(jaxpr, context))
            found = tuple(f for match in matches for f in (*match.inside, *match.own))
            self._plans[key] = Plan(jaxpr, consts, matches, found)
        return self._plans[key]

    def _matches(self, jaxpr: Any, context: _Context) -> Iterator[Match]:
        variables = self.variables.find(jaxpr) if self.variables else {}
        for index, eqn in enumerate(jaxpr.eqns):
            own = self._own(eqn, context, variables.get(index, {}))
            inner = nested(eqn)
            plans, inside = (), ()
            if inner is not None:
                matched = {hit.target for found in own for hit in found.hits}
                below = self._below(eqn, inner, context, frozenset(matched))
                plans = tuple(
                    self._plan(b.jaxpr, b.consts, below) for b in inner.bodies
                )
                inside = tuple(_lifted(f, inner, eqn) for p in plans for f in p.found)
            elif _jax.is_opaque(eqn):
                self._peek(eqn, context)
            if own or inside:
                yield Match(index, eqn, own, plans if inside else (), inside)

    def _peek(self, eqn: Any, context: _Context) -> None:
        """Note a program that cannot be opened, and the wanted names in it."""
        line = _jax.line_of(eqn)
        self.opaque[eqn.primitive.name] = line
        for jaxpr in map(_jax.opened, _jax.inner_jaxprs(eqn)):
            names = self._plan(*jaxpr, dataclasses.replace(context, ops=frozenset()))
            for found in names.found:
                self.unreachable[found.name] = f'"{eqn.primitive.name}" at {line}'

    def _own(
        self, eqn: Any, context: _Context, variables: Mapping[int, Any]
    ) -> tuple[Found, ...]:
        primitive, point = _jax.kind_of(eqn), ""
        if primitive == "name":
            point = _jax.params_of(eqn)["name"]
            self.names[point] = None
            hits = self._named(point)
        else:
            hits = ()
        if self._ops:
            hits = (*hits, *self._operation(eqn, primitive, context))
        if not hits and not variables:
            return ()
        assigned = [
            tuple(
                Hit(target, name, tree=Leaf(""))
                for target, name in variables.get(k, ())
            )
            for k in range(len(eqn.outvars))
        ]
        first = next(hit for mine in (hits, *assigned) for hit in mine)
        name = point or first.root
        state = (context.rule, context.dynamic, self._differentiated(eqn, context))
        found = []
        for position, var in enumerate(eqn.outvars):
            mine = hits
            if len(eqn.outvars) > 1:
                parts = tuple(map(str, range(len(eqn.outvars))))
                same = {"parts": parts, "tree": tuple(map(Leaf, parts))}
                mine = [
                    dataclasses.replace(hit, position=position, **same) for hit in hits
                ]
            mine = (*mine, *assigned[position])
            size = math.prod(getattr(var.aval, "shape", ()))
            found.append(Found(name, mine, var.aval, _jax.line_of(eqn), *state, size))
        return tuple(found)

    def _named(self, name: str) -> tuple[Hit, ...]:
        hits = []
        for target, regex in self._points:
            root = next((p for p in prefixes(name) if regex.fullmatch(p + "/")), None)
            if root is not None:
                hits.append(_hit(target, root, name))
        return tuple(hits)

    def _operation(self, eqn: Any, primitive: str, context: _Context) -> Iterator[Hit]:
        names = (primitive, _jax.call_name(eqn))
        self.ops.update(dict.fromkeys(name for name in names if name))
        for target, op in self._ops:
            if target not in context.ops or op.name not in names:
                continue
            if op.within and op.within not in context.scopes | _scopes(eqn):
                continue
            if context.rule:
                self.hidden.setdefault(target, _jax.line_of(eqn))
            else:
                yield Hit(target, op.name, operation=primitive != "name")

    def _below(
        self, eqn: Any, inner: Nested, context: _Context, matched: frozenset[int]
    ) -> _Context:
        scopes = context.scopes
        if self._scoped:
            name = _jax.call_name(eqn)
            scopes = scopes | _scopes(eqn) | ({name} if name else set())
        return _Context(
            context.ops - matched,
            scopes,
            context.rule or inner.rule,
            context.dynamic or inner.dynamic,
            self._differentiated(eqn, context),
        )

    @staticmethod
    def _differentiated(eqn: Any, context: _Context) -> bool:
        return context.differentiated or "jvp(" in _jax.scopes_of(eqn)


def _lifted(found: Found, inner: Nested, eqn: Any) -> Found:
    line = found.line or _jax.line_of(eqn)
    copies = inner.copies(found.aval)
    return dataclasses.replace(
        found,
        aval=inner.lift(found.aval, len(found.steps)),
        line=line,
        copies=(copies, *found.copies) if copies else found.copies,
    )


def _hit(target: int, root: str, name: str) -> Hit:
    if not isinstance(name, PointName):
        return Hit(target, root)
    below = root[len(name.root) + 1 :]
    tree = next(tree for path, tree in nodes(name.tree) if path == below)
    parts = tuple(leaf.name for leaf in leaves(tree))
    return Hit(target, root, parts.index(str(name)), parts, tree)


def leaves(tree: Any) -> list[Leaf]:
    """Traced leaves of a `PointName`'s tree."""
    return [node for _, node in nodes(tree) if isinstance(node, Leaf)]


def _scopes(eqn: Any) -> frozenset[str]:
    """Names of the scopes and functions that an equation was traced in."""
    names = set(re.split(r"[/()]", _jax.scopes_of(eqn)))
    for caller in _jax.callers_of(eqn):
        parts = caller.split(".")
        names |= {caller, parts[-1]}
        if parts[-1] == "__call__" and len(parts) > 1:
            names.add(parts[-2])  # a module: by the name of its class
    return frozenset(names - {""})


def live(
    jaxpr: Any, plan: Plan | None, sinks: Sequence[bool]
) -> tuple[list[Any], set[Any]]:
    """Return the equations that the sinks need, and the variables they read.

    `sinks` holds a flag for each result and for each found value. Equations with
    effects are always needed.
    """
    pairs = zip(jaxpr.outvars, sinks, strict=False)
    used = {v for v, s in pairs if s and not isinstance(v, _jax.Literal)}
    asked, start = dict[int, bool](), len(jaxpr.outvars)
    for match in plan.matches if plan else ():
        end = start + len(match.inside) + len(match.own)
        asked[match.index] = any(sinks[start:end])
        start = end
    eqns = []
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        needed = asked.get(index) or eqn.effects
        if needed or any(v in used for v in eqn.outvars):
            eqns.append(eqn)
            used.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    return eqns[::-1], used
