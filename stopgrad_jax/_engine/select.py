"""What an address means in a traced function: a tree of places.

A place is a `Value` (an argument, an output or a found point, by number) or a
`Static`. Everything after this file works with places only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from stopgrad_jax._address import (
    RETURN,
    Address,
    Op,
    Point,
    Var,
    has_wildcard,
    is_address,
    matching,
    nearest,
    nodes,
    require_one_meaning,
)
from stopgrad_jax._checks import shown
from stopgrad_jax._errors import AddressError, beats, quoted

from .edits import assembled
from .trace import Static, Traced, Value
from .unfound import no_variable, refuse_variables
from .walk import Found, Hit, Plan, Search

Target = Point | Op | Var


@dataclasses.dataclass(frozen=True)
class Matched:
    """What one address selects: full addresses and the places there."""

    address: Address
    places: dict[str, Any]

    @property
    def tree(self) -> Any:
        """The selected tree; for a pattern, a dict of them."""
        if isinstance(self.address, str) and has_wildcard(self.address):
            return self.places
        (tree,) = self.places.values()
        return tree


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function in which some addresses have been looked up."""

    traced: Traced
    plan: Plan
    targets: Sequence[Target]
    matched: dict[Address, Matched]

    @functools.cached_property
    def types(self) -> dict[Value, Any]:
        """Type of every place."""
        edges = {
            "argument": self.traced.jaxpr.invars,
            "output": self.traced.jaxpr.outvars,
            "point": self.plan.found,
        }
        return {
            Value(kind, k): x.aval
            for kind, xs in edges.items()
            for k, x in enumerate(xs)
        }

    def tree(self, addresses: Any) -> Any:
        """Replace each address in a pytree by the places it selects."""
        return jax.tree.map(
            lambda a: self.matched[a].tree, addresses, is_leaf=is_address
        )

    def found(self, addresses: Iterable[Address]) -> dict[int, Found]:
        """Found values that these addresses select, by number."""
        trees = [self.matched[a].tree for a in addresses]
        values = [v for v in jax.tree.leaves(trees) if isinstance(v, Value)]
        numbers = {v.index for v in values if v.kind == "point"}
        return {k: self.plan.found[k] for k in sorted(numbers)}

    def targets_of(self, addresses: Iterable[Address]) -> frozenset[int]:
        """Positions of these addresses among the targets of the search."""
        wanted = {_target(a) for a in addresses}
        return frozenset(k for k, t in enumerate(self.targets) if t in wanted)


def look_up(traced: Traced, addresses: Iterable[Address], called: str) -> Program:
    """Find what each address selects, or raise `AddressError`."""
    addresses = list(dict.fromkeys(addresses))
    targets = [t for t in map(_target, addresses) if t is not None]
    search = Search(targets, traced.fun)
    plan = search.plan(traced.jaxpr, traced.consts)
    if search.variables and search.variables.missing:
        search = Search(targets, traced.fun, search.variables.missing)
        plan = search.plan(traced.jaxpr, traced.consts)
    for name, place in search.unreachable.items():
        raise AddressError(
            beats(
                f'{called}: point "{name}"',
                "every value of that name must be in a program that can be rewritten",
                f"one inside {place}, which cannot",
                "another name there, or for its operands and results",
            )
        )
    if search.variables:
        refuse_variables(search.variables, targets, called)
    finder = _Finder(traced, search, plan, called)
    matched = {a: Matched(a, finder.find(a)) for a in addresses}
    return Program(traced, plan, targets, matched)


def listed(addresses: Any, called: str, what: str) -> list[Address]:
    """Flatten a pytree of addresses, or raise if something else is in it."""

    def is_leaf(x: Any) -> bool:
        return x is None or is_address(x)

    flat = jax.tree.leaves(addresses, is_leaf=is_leaf)
    for leaf in flat:
        if not is_address(leaf):
            raise TypeError(
                beats(
                    called,
                    f"{what} must be addresses: an argument's name or position, a "
                    "point's name, sg.point(...), sg.op(...) or sg.var(...)",
                    f"{shown(leaf)} ({type(leaf).__name__})",
                    f'{what}="name" for the argument or point of that name',
                )
            )
    return flat


def _target(address: Address) -> Target | None:
    """What to look for in the program, if it can be there."""
    if isinstance(address, Target):
        return address
    if isinstance(address, int):
        return None
    return Point(address)


class _Finder:
    def __init__(self, traced: Traced, search: Search, plan: Plan, called: str) -> None:
        self._traced, self._search, self._plan = traced, search, plan
        self._called = called
        self._edge: dict[str, Any] | None = None

    def find(self, address: Address) -> dict[str, Any]:
        """Return what the address selects, by full address; never nothing."""
        edge = self._at_edge(str(address)) if isinstance(address, int | str) else {}
        inside = self._inside(address)
        both = edge.keys() & inside.keys()
        if both:
            name = next(iter(both))
            raise AddressError(
                beats(
                    f'{self._called}: address "{address}"',
                    "an address must mean one thing",
                    f'an argument and a point are both called "{name}"',
                    f'sg.point("{name}") for the point, or the position of the '
                    "argument",
                )
            )
        if not edge and not inside:
            raise self._no_match(address)
        return edge | inside

    def _at_edge(self, text: str) -> dict[str, Any]:
        """Arguments and outputs under this path; of a pattern, each value once."""
        if self._edge is None:
            self._edge = dict(self._edges(self._traced.roots))
        known = self._edge
        if has_wildcard(text):
            outputs = text.startswith(RETURN)
            known = dict(self._edges(self._traced.named, outputs))
        matched = matching(text, known)
        require_one_meaning(text, matched, self._called)
        return {path: known[path] for path in matched}

    def _edges(
        self, roots: dict[str, Any], outputs: bool = True
    ) -> Iterator[tuple[str, Any]]:
        for name, tree in roots.items():
            yield from nodes(tree, name)
        if outputs:
            yield from nodes(self._traced.output, RETURN)

    def _inside(self, address: Address) -> dict[str, Any]:
        """Found values that the address selects: a tuple where there are several."""
        target = _target(address)
        if target is None:
            return {}
        number = self._search.targets.index(target)
        groups: dict[str, list[tuple[int, Found, Hit]]] = {}
        for k, found in enumerate(self._plan.found):
            for hit in found.hits:
                if hit.target == number:
                    groups.setdefault(hit.root, []).append((k, found, hit))
        places = {}
        for root, group in groups.items():
            values = list(_together(root, group))
            places[root] = values[0] if len(values) == 1 else tuple(values)
        return places

    def _no_match(self, address: Address) -> AddressError:
        search, called = self._search, f"{self._called}: address {address!r}"
        if isinstance(address, Op):
            return self._no_operation(address, called)
        if isinstance(address, Var) and search.variables:
            return no_variable(search.variables, address, called, self._traced.name)
        names = list(search.names)
        if isinstance(address, Point):
            known, text = names, address.name
        else:
            self._at_edge("")
            known, text = [*(self._edge or ()), *names], str(address)
        opaque = "".join(
            f'; "{primitive}" at {line} holds a program that cannot be searched'
            for primitive, line in search.opaque.items()
        )
        near = nearest(text, known) or _top(self._traced, names)
        return AddressError(
            beats(
                called,
                "it must match an argument, an output or a named point of "
                f"{self._traced.name}",
                f"arguments {quoted(self._traced.arguments)}, "
                f"points {quoted(names)}{opaque}",
                f"one of {quoted(near)}",
            )
        )

    def _no_operation(self, op: Op, called: str) -> AddressError:
        number = self._search.targets.index(op)
        if number in self._search.hidden:
            return AddressError(
                beats(
                    called,
                    "an operation is not looked for in the body of a custom rule",
                    f"its only matches are there ({self._search.hidden[number]})",
                    "sg.op of the function that has the rule",
                )
            )
        ops = list(self._search.ops)
        return AddressError(
            beats(
                called,
                f"it must match a jitted function or primitive of {self._traced.name}",
                f"operations {quoted(ops)}",
                f"one of {quoted(nearest(op.name, ops) or ops)}",
            )
        )


def _top(traced: Traced, names: Iterable[str]) -> list[str]:
    return [*traced.arguments, *names, RETURN]


def _together(root: str, group: Iterable[tuple[int, Found, Hit]]) -> Iterator[Any]:
    """Put what one address selects together, place by place in program order."""
    parts: dict[str, Any] = {}
    last: Hit | None = None

    def whole() -> Any:
        if last is not None and last.tree is not None:
            # JAX removes a leaf from the program where nothing uses it.
            return assembled(last, [parts.get(p, Static(None)) for p in last.parts])
        return parts[""] if "" in parts else _nest(parts)

    for k, found, hit in group:
        alone = hit.tree is None
        part = found.name[len(root) + 1 :] if alone else hit.parts[hit.position]
        same = last is not None and hit.parts == last.parts
        if parts and (not same or part in parts or "" in (part, *parts)):
            yield whole()
            parts = {}
        parts[part], last = Value("point", k), hit
    yield whole()


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}: leaves that other libraries name one by one."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out
