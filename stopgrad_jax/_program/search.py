"""Find where addresses match in a traced function, reading only.

`search` descends through every nested jaxpr and returns a `Plan`: for each jaxpr
that holds a match, the equations concerned and the plans of what is inside them. A
jaxpr that is called many times is searched once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import (
    Op,
    Point,
    Var,
    joined,
    matches_scope,
    nodes,
    pattern,
    prefixes,
)
from stopgrad_jax._source.variables import Variables

from .control import Control, control
from .operations import Group, Operations, Taken, callers
from .parameters import ParameterName
from .plan import Found, Hit, Match, NamedLeaf, Plan, PointName, leaves


@dataclasses.dataclass(frozen=True)
class _Context:
    ops: frozenset[int]  # the ops still looked for here
    path: str = ""  # the named scopes around it
    callers: frozenset[str] = frozenset()  # the functions that it is called by
    rule: bool = False
    dynamic: bool = False
    differentiated: bool = False
    rule_names: tuple[str, ...] = ()  # of the function whose rule it is, the outermost


class Search:
    """Look for `targets`, and remember every name on the way for error messages.

    `hidden` maps a target to the custom rules with a match in their body, where
    operations are not looked for (names of the function, and a line), `taken` to the
    line of a call of which a derivative has been taken, `outside` to the scopes of
    matches that are not within its own.
    `opaque` maps primitives that hold a program which cannot be searched to a line,
    `unreachable` wanted names in them to where that is. `fun` is the function
    searched, `anywhere` see `Variables`, `named` see `Parameters`.
    """

    def __init__(
        self,
        targets: Sequence[Point | Op | Var],
        fun: Any = None,
        anywhere: frozenset[int] = frozenset(),
        named: Mapping[Any, list[tuple[int, str]]] | None = None,
    ) -> None:
        self.targets, self._handed = targets, named or {}
        self.names: dict[str, None] = {}
        self.ops: dict[str, None] = {}
        self.hidden: dict[int, dict[tuple[str, ...], str]] = {}
        self.taken: dict[int, str] = {}
        self.outside: dict[int, dict[str, None]] = {}
        self.opaque: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        self.buried: dict[str, None] = {}  # names in such programs, wanted or not
        self._points = [
            (k, pattern(target.name))
            for k, target in enumerate(targets)
            if isinstance(target, Point)
        ]
        self._ops = [(k, op) for k, op in enumerate(targets) if isinstance(op, Op)]
        # Labels read the whole stack of every equation: only where they are needed.
        names = {k: var for k, var in enumerate(targets) if isinstance(var, Var)}
        self.variables = Variables(names, fun, anywhere) if names else None
        self.operations = Operations(self._ops)
        self._scoped = any(op.within for _, op in self._ops)
        self._plans: dict[Any, Plan] = {}

    def plan(self, jaxpr: Any, consts: Sequence[Any]) -> Plan:
        """Search a whole program."""
        return self._plan(jaxpr, consts, _Context(frozenset(k for k, _ in self._ops)))

    def _plan(self, jaxpr: Any, consts: Sequence[Any], context: _Context) -> Plan:
        # What is meant in a jaxpr depends on where it is called: each context has a
        # plan.
        key = (id(jaxpr), context)
        if key not in self._plans:
            matches = tuple(self._matches(jaxpr, context))
            found = tuple(f for match in matches for f in (*match.inside, *match.own))
            self._plans[key] = Plan(jaxpr, consts, matches, found)
        return self._plans[key]

    def _matches(self, jaxpr: Any, context: _Context) -> Iterator[Match]:
        """Yield the equations with a match of their own, or in a program they hold.

        An address is not looked for again in an operation that it means: neither in its
        other equations nor in the bodies below.
        """
        assigned = self._assigned(jaxpr)
        groups = self._groups(jaxpr, context) if self._ops else []
        covered: dict[int, set[int]] = {}
        for group in groups:
            for number, hits in _hits_of(group):
                assigned.setdefault(number, []).append(hits)
            for index in group.indices:
                covered.setdefault(index, set()).add(group.target)
        for index, eqn in enumerate(jaxpr.eqns):
            taken = frozenset(covered.get(index, ()))
            here = dataclasses.replace(context, ops=context.ops - taken)
            own = self._own(eqn, here, assigned, jaxpr)
            inner = control(eqn)
            plans, inside = (), ()
            if inner is not None:
                matched = {hit.target for found in own for hit in found.hits}
                below = self._below(eqn, inner, here, frozenset(matched))
                plans = tuple(
                    self._plan(b.jaxpr, b.consts, below) for b in inner.bodies
                )
                inside = tuple(lifted(f, inner, eqn) for p in plans for f in p.found)
            elif _jax.is_opaque(eqn):
                self._peek(eqn, context)
            if own or inside:
                yield Match(index, eqn, own, plans if inside else (), inside)

    def _peek(self, eqn: Any, context: _Context) -> None:
        """Note a program that cannot be opened, and the wanted names in it."""
        line = _jax.line_of(eqn)
        at = f" at {line}" if line else ""
        programs = [_jax.opened(jaxpr) for jaxpr in _jax.inner_jaxprs(eqn)]
        # Apart for so long: names in there are known from those that can be addressed.
        outside, self.names = self.names, {}
        for jaxpr in programs:
            names = self._plan(*jaxpr, dataclasses.replace(context, ops=frozenset()))
            for found in names.found:
                self.unreachable[found.name] = f'"{eqn.primitive.name}"{at}'
        if self.names or not all(_is_one_operation(jaxpr) for jaxpr, _ in programs):
            self.opaque[eqn.primitive.name] = line
        self.buried |= self.names
        self.names = outside | self.names

    def _assigned(self, jaxpr: Any) -> dict[Any, list[Hit]]:
        """Return {result: what variables it is} of the equations of a jaxpr."""
        found: dict[Any, list[Hit]] = {}
        if self.variables is None:
            return found
        for var, hits in self.variables.find(jaxpr).items():
            found[var] = [
                Hit(target, name, tree=NamedLeaf(""), level=level)
                for target, name, level in hits
            ]
        for eqn in jaxpr.eqns if self._handed else ():
            for target, name in self._handed.get((*eqn.outvars, None)[0], ()):
                hit = Hit(target, name, tree=NamedLeaf(""))
                found.setdefault(eqn.outvars[0], []).append(hit)
        return found

    def _own(
        self,
        eqn: Any,
        context: _Context,
        assigned: Mapping[Any, Sequence[Hit]],
        jaxpr: Any,
    ) -> tuple[Found, ...]:
        """Return what is found of each result of an equation, if of any."""
        point = _jax.params_of(eqn)["name"] if _jax.kind_of(eqn) == "name" else ""
        whole, count = list(self._hits(eqn, point, context)), len(eqn.outvars)
        every = [
            (*(_part(hit, k, count) for hit in whole), *assigned.get(var, ()))
            for k, var in enumerate(eqn.outvars)
        ]
        if not any(every):
            return ()
        name = point if point and whole else next(filter(None, every))[0].root
        line, taken = _jax.line_of(eqn), self._differentiated(eqn, context)

        def found(var: Any, hits: tuple[Hit, ...]) -> Found:
            # A call that takes a derivative is no part of what it differentiates.
            is_call = bool(hits) and all(hit.group is not None for hit in hits)
            own = context.differentiated if is_call else taken
            return Found(
                name,
                hits,
                var.aval,
                line,
                context.rule,
                context.dynamic,
                own,
                math.prod(getattr(var.aval, "shape", ())),
                feeds=bool(hits) and own and not point and _feeds(jaxpr, eqn, var),
            )

        return tuple(map(found, eqn.outvars, every))

    def _hits(self, eqn: Any, point: str, context: _Context) -> Iterator[Hit]:
        """Yield what an equation is as a whole: a point, an operation."""
        # The name of a parameter is ours: no error may tell it as one that is there.
        if point and not isinstance(point, ParameterName):
            self.names[point] = None
            yield from self._named(point)
        if self._ops:
            yield from self._operation(eqn, context)

    def _named(self, name: str) -> Iterator[Hit]:
        for target, regex in self._points:
            root = next((p for p in prefixes(name) if regex.fullmatch(p + "/")), None)
            if root is not None:
                yield _hit(target, root, name)

    def _operation(self, eqn: Any, context: _Context) -> Iterator[Hit]:
        primitive = eqn.primitive.name
        names = (primitive, _jax.call_name(eqn))
        self.ops.update(dict.fromkeys(name for name in names if name))
        place = None
        for target, name in self.operations.named(eqn):
            if target in context.ops:
                place = place or self._around(eqn, context)
                if self._is_within(target, *place) and not self._is_hidden(
                    target, eqn, context
                ):
                    yield Hit(target, name, operation=primitive != "name")

    def _groups(self, jaxpr: Any, context: _Context) -> list[Group]:
        """Return the calls of Python functions that are meant in a jaxpr."""
        groups, taken = self.operations.groups(jaxpr)

        def is_meant(call: Group | Taken) -> bool:
            path = joined(context.path, call.scope)
            around = context.callers | call.callers
            return call.target in context.ops and self._is_within(
                call.target, path, around
            )

        for call in taken:
            if call.target not in self.taken and not context.rule and is_meant(call):
                self.taken[call.target] = call.line
        return [
            group
            for group in groups
            if is_meant(group)
            and not self._is_hidden(group.target, group.eqns[0], context)
        ]

    def _is_within(self, target: int, path: str, callers: frozenset[str]) -> bool:
        op = self.targets[target]
        within = op.within if isinstance(op, Op) else None
        if within is None or matches_scope(within, path):
            return True
        name = pattern(within)
        if any(name.fullmatch(caller + "/") for caller in callers):
            return True
        self.outside.setdefault(target, {}).update(
            dict.fromkeys([path] if path else [])
        )
        return False

    def _is_hidden(self, target: int, eqn: Any, context: _Context) -> bool:
        """Tell whether it is in the body of a custom rule, and remember that."""
        if context.rule:
            rules = self.hidden.setdefault(target, {})
            rules.setdefault(context.rule_names, _jax.line_of(eqn))
        return context.rule

    def _around(self, eqn: Any, context: _Context) -> tuple[str, frozenset[str]]:
        """Return the path of scopes around an equation, and the functions it is in."""
        if not self._scoped:
            return "", frozenset()
        path = joined(context.path, _jax.scope_of(eqn))
        codes = (code for code, _ in _jax.stack_of(eqn))
        return path, context.callers | {name for c in codes for name in callers(c)}

    def _below(
        self, eqn: Any, inner: Control, context: _Context, matched: frozenset[int]
    ) -> _Context:
        path, callers = self._around(eqn, context)
        name = _jax.call_name(eqn) if self._scoped else None
        return _Context(
            context.ops - matched,
            path,
            callers | ({name} if name else set()),
            context.rule or inner.rule,
            context.dynamic or inner.dynamic,
            self._differentiated(eqn, context),
            context.rule_names or self._rule_names(eqn, inner),
        )

    def _rule_names(self, eqn: Any, inner: Control) -> tuple[str, ...]:
        """What the function of a custom rule may be addressed by."""
        name = _jax.call_name(eqn) if inner.rule and self._ops else None
        return (name, eqn.primitive.name) if name else ()

    @staticmethod
    def _differentiated(eqn: Any, context: _Context) -> bool:
        # The values that a derivative is taken at stand in its scope, beside the
        # tangents: an edit of them would not reach these.
        return context.differentiated or "jvp" in _jax.transforms_of(eqn)


def _feeds(jaxpr: Any, eqn: Any, result: Any) -> bool:
    """Tell a result that the derivative of its own operation is computed from.

    That was made by the same call of the user's, and is another operation.
    """
    call, _ = _jax.frames_of(eqn)
    return bool(call) and any(
        any(atom is result for atom in reader.invars)
        and reader.primitive is not eqn.primitive
        and _jax.frames_of(reader)[0] == call
        for reader in jaxpr.eqns
    )


def lifted(found: Found, inner: Control, eqn: Any) -> Found:
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
    # An address may mean a part of a named tree, "cache/0" of "cache": the leaves of
    # that part belong together, and no others.
    below = root[len(name.root) + 1 :]
    tree = next(tree for path, tree in nodes(name.tree) if path == below)
    parts = tuple(leaf.name for leaf in leaves(tree))
    return Hit(target, root, parts.index(str(name)), parts, tree)


def _part(hit: Hit, position: int, count: int) -> Hit:
    """Return what an operation is at one of its results."""
    if count == 1:
        return hit
    parts = tuple(map(str, range(count)))
    tree = tuple(map(NamedLeaf, parts))
    return dataclasses.replace(hit, position=position, parts=parts, tree=tree)


def _hits_of(group: Group) -> Iterator[tuple[Any, Hit]]:
    """Yield (result, what it is of the group)."""
    hit = Hit(group.target, group.name, operation=True, group=group)
    count = len(group.writes)
    for k, var in enumerate(group.writes):
        yield var, _part(hit, k, count)


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


def _is_one_operation(jaxpr: Any) -> bool:
    """Tell what nobody looks into, as the sum of two values of a scatter-add."""
    return not jaxpr.eqns[1:] and not any(map(_jax.programs_in, jaxpr.eqns))
