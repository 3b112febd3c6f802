"""What an address means in a traced function: a tree of places.

A place is a `Place` (an argument, an output or a found point, by number) or a
`Static`. Everything after this file works with places only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    nodes,
    require_one_meaning,
)
from stopgrad_jax._checks import shown
from stopgrad_jax._errors import AddressError, wrong
from stopgrad_jax._source.variables import Variables
from stopgrad_jax._source.watched import Seen

from . import nth
from .gathered import together
from .parameters import Parameters
from .plan import Found, Hit, Plan
from .search import Search
from .trace import Place, Traced
from .unfound import Looked, as_code
from .unmatched import Unmatched
from .wanted import ANYTHING, Wanted

Target = Point | Op | Var


@dataclasses.dataclass(frozen=True)
class Matched:
    """What one address selects: full addresses and the places there."""

    address: Address
    places: dict[str, Any]

    @property
    def tree(self) -> Any:
        """The selected tree; for a pattern, a dict of them."""
        at = self.address.name if isinstance(self.address, Point) else self.address
        if isinstance(at, str) and has_wildcard(at):
            return self.places
        (tree,) = self.places.values()
        return tree


@dataclasses.dataclass(frozen=True)
class LookedUp:
    """A traced function in which some addresses have been looked up."""

    traced: Traced
    plan: Plan
    targets: Sequence[Target]
    matched: dict[Address, Matched]

    @functools.cached_property
    def types(self) -> dict[Place, Any]:
        """Type of every place."""
        edges = {
            "argument": self.traced.jaxpr.invars,
            "output": self.traced.jaxpr.outvars,
            "point": self.plan.found,
        }
        return {
            Place(kind, k): x.aval
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
        values = [v for v in jax.tree.leaves(trees) if isinstance(v, Place)]
        numbers = {v.index for v in values if v.kind == "point"}
        return {k: self.plan.found[k] for k in sorted(numbers)}

    def targets_of(self, addresses: Iterable[Address]) -> frozenset[int]:
        """Positions of these addresses among the targets of the search."""
        wanted = {_target(a) for a in addresses}
        return frozenset(k for k, t in enumerate(self.targets) if t in wanted)


@dataclasses.dataclass(frozen=True)
class _Searched:
    """A program after the search; where parameters are asked for, they are named."""

    traced: Traced
    targets: Sequence[Target]
    search: Search
    plan: Plan
    parameters: Sequence[Parameters]
    seen: Sequence[Seen]


def look_up(
    traced: Traced,
    addresses: Iterable[Address],
    called: str,
    wanted: Mapping[Address, Wanted] | None = None,
) -> LookedUp:
    """Find what each address selects, or raise `AddressError`.

    `wanted` says what the call takes there, where that is not anything.
    """
    addresses = list(dict.fromkeys(addresses))
    found = _searched(traced, addresses)
    for name, place in found.search.unreachable.items():
        raise wrong(
            AddressError,
            f'{called}: point "{name}"',
            "every value of that name must be in a program that can be rewritten",
            f"one inside {place}, which cannot",
            "another name there, or for its operands and results",
        )
    looked = _looked(found)
    if looked.variables:
        looked.variables.refuse(found.targets, called)
    plan = found.plan
    for number, op in enumerate(found.targets):
        if isinstance(op, Op):
            nth.require_told(found.search, found.plan, op, number, called)
            if op.nth is not None:
                plan = _chosen(plan, found, op, called)
    finder = _Finder(found.traced, found.targets, plan, called, looked)
    takes = {a: (wanted or {}).get(a, ANYTHING) for a in addresses}
    matched = {a: Matched(a, finder.find(a, takes[a])) for a in addresses}
    return LookedUp(found.traced, plan, found.targets, matched)


def _looked(found: _Searched) -> Unmatched:
    """Return what errors may tell of a search."""
    search, traced = found.search, found.traced

    def working(
        addresses: Iterable[Address], wanted: Wanted = ANYTHING
    ) -> list[Address]:
        return _working(traced, list(dict.fromkeys(addresses)), wanted)

    # The function is called anew for each variable, and several errors ask of one.
    @functools.cache
    def look(var: Var) -> Any:
        return _looked(_searched(traced, [var], libraries=False)).variables

    def assigned(var: Var, also: str) -> tuple[Variables | None, Sequence[Seen]]:
        found = _searched(traced, [var], also=also)
        return found.search.variables, found.seen

    variables = search.variables and Looked(
        traced, search.variables, found.parameters, working, assigned
    )
    return Unmatched(traced, found.targets, search, variables, working, look)


def _working(
    traced: Traced, addresses: Sequence[Address], wanted: Wanted
) -> list[Address]:
    """Return those of some addresses that select something, and one thing only."""
    found, works = _searched(traced, addresses), []
    looked = _looked(found)
    program = LookedUp(found.traced, found.plan, found.targets, {})
    for address in addresses:
        target = _target(address)
        finder = _Finder(traced, found.targets, found.plan, "", looked)
        edge, inside = finder.selected(address)
        odd = len(edge) > 1 and not has_wildcard(str(address))  # it means two places
        if f"{address}/".startswith(RETURN + "/"):  # also where it is no array
            odd |= "output" not in wanted.kinds
        if odd or not wanted.fits(program, [*(edge | inside).values()]):
            continue
        if isinstance(target, Var):
            number = found.targets.index(target)
            variables = looked.variables
            if variables is not None and variables.is_clear(number, target):
                works.append(address)
            continue
        if (edge or inside) and not edge.keys() & inside.keys():
            if not isinstance(target, Op) or _is_told(found, target):
                works.append(address)
    return works


def _is_told(found: _Searched, op: Op) -> bool:
    """Tell whether an operation means some matches, and it is known which."""
    plan, number = found.plan, found.targets.index(op)
    why = nth.taken(found.search, plan, number) or nth.unclear(plan, op, number)
    return not why and bool(_indices(plan, found, op))


def _indices(plan: Plan, found: _Searched, op: Op) -> Sequence[int]:
    """Return which of the matches of an operation are meant."""
    try:
        return op.chosen(nth.how_many(plan, found.targets.index(op)))
    except IndexError:
        return ()


def _chosen(plan: Plan, found: _Searched, op: Op, called: str) -> Plan:
    """Keep only those matches of an operation that its `nth` means."""
    number = found.targets.index(op)
    total, chosen = nth.how_many(plan, number), _indices(plan, found, op)
    if total and not chosen:
        first, whole = (dataclasses.replace(op, nth=n) for n in (0, None))
        raise wrong(
            AddressError,
            f"{called}: address {op!r}",
            f"nth is an index of a match, from {-total} to {total - 1}",
            f"{total} matches" if total > 1 else "1 match",
            f"{first!r}, or {whole!r} for all",
        )
    return nth.narrowed(plan, number, chosen)


def _searched(
    traced: Traced,
    addresses: Iterable[Address],
    libraries: bool = True,
    also: str = "",
) -> _Searched:
    """Search for addresses; for variables first in statements, then in parameters.

    The user's code comes before that of installed libraries, if that counts. `also` is
    a variable that is watched beside those.
    """
    targets = [t for t in map(_target, addresses) if t is not None]
    parameters = list[Parameters]()
    seen: Sequence[Seen] = ()
    labels = (t.label for t in targets if isinstance(t, Var))
    names = frozenset(label.rpartition(".")[2] for label in labels)
    if names:
        # What is watched is searched, too: the variables that are seen are of that
        # trace.
        traced, seen = traced.watched(names | {also})

    def search(anywhere: frozenset[int] = frozenset()) -> tuple[Search, Plan]:
        named = {var: hits for p in parameters for var, hits in p.named.items()}
        search = Search(targets, traced.fun, anywhere, named)
        return search, search.plan(traced.jaxpr, traced.consts)

    def named(missing: frozenset[int], where: str) -> frozenset[int]:
        """Name parameters; return those that are none."""
        nonlocal traced
        pairs = [(k, t) for k, t in enumerate(targets) if k in missing]
        asked = {k: t for k, t in pairs if isinstance(t, Var)}
        if asked:
            parameters.append(Parameters(asked, traced, where))
            traced = dataclasses.replace(traced, jaxpr=parameters[-1].program())
            parameters[-1].compare(seen)
        return parameters[-1].silent if asked else missing

    found, plan = search()
    missing = found.variables.missing if found.variables else frozenset()
    if missing:
        missing = named(missing, "here")
    if missing and libraries:
        missing = named(missing, "at home")
        home = parameters[-1]
        # A parameter that could not be told may be a statement's variable in a library:
        # that it could not is said only where nothing else is found.
        missing |= home.untold
        found, plan = search(missing)
        if found.variables and missing & found.variables.missing:
            named(missing & found.variables.missing, "anywhere")
            home.forget(parameters[-1].told)
            found, plan = search(missing)
    elif parameters:
        found, plan = search()
    if found.variables:
        found.variables.compare(seen)
    return _Searched(traced, targets, found, plan, parameters, seen)


def addresses_in(addresses: Any, called: str, what: str) -> list[Address]:
    """Flatten a pytree of addresses, or raise if something else is in it."""

    def is_leaf(x: Any) -> bool:
        return x is None or is_address(x)

    flat = jax.tree.leaves(addresses, is_leaf=is_leaf)
    for leaf in flat:
        if not is_address(leaf):
            raise wrong(
                TypeError,
                called,
                f"{what} must be addresses: an argument's name or position, a "
                "point's name, sg.point(...), sg.op(...) or sg.var(...)",
                f"{shown(leaf)} ({type(leaf).__name__})",
                f'{what}="name" for the argument or point of that name',
            )
    return flat


def _target(address: Address) -> Target | None:
    """What to look for in the program, if it can be there."""
    if isinstance(address, int):
        return None
    return address if isinstance(address, Target) else Point(address)


class _Finder:
    def __init__(
        self,
        traced: Traced,
        targets: Sequence[Target],
        plan: Plan,
        called: str,
        looked: Unmatched,
    ) -> None:
        self._traced, self._targets, self._plan = traced, targets, plan
        self._called, self._looked = called, looked
        self._edge: dict[str, Any] | None = None

    def find(self, address: Address, wanted: Wanted) -> dict[str, Any]:
        """Return what the address selects, by full address; never nothing.

        `wanted` is for what the error says to write instead.
        """
        edge, inside = self.selected(address)
        require_one_meaning(str(address), list(edge), self._called)
        both = edge.keys() & inside.keys()
        if both:
            name = next(iter(both))
            place = self._traced.by_position(name)
            other = "" if place is None else f"{as_code(place)} for the argument"
            raise wrong(
                AddressError,
                f'{self._called}: address "{address}"',
                "an address must mean one thing",
                f'an argument and a point are both called "{name}"',
                f"{Point(name)!r} for the point, or "
                + (other or "another name for it"),
            )
        if not edge and not inside:
            raise self._looked.suggesting(wanted).no_match(address, self._called)
        return edge | inside

    def selected(self, address: Address) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what an address selects at the edge of the function, and inside."""
        edge = self._at_edge(str(address)) if isinstance(address, int | str) else {}
        return edge, self._inside(address)

    def _at_edge(self, text: str) -> dict[str, Any]:
        """Arguments and outputs under this path; of a pattern, each value once."""
        if self._edge is None:
            self._edge = dict(self._edges(self._traced.roots))
        known = self._edge
        # An argument has two paths, by name and by position; a pattern means it once.
        # Results are meant where it begins with them: `**` is all that goes in.
        if has_wildcard(text):
            outputs = text.startswith(RETURN)
            known = dict(self._edges(self._traced.named, outputs))
        return {path: known[path] for path in matching(text, known)}

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
        number = self._targets.index(target)
        groups: dict[str, list[tuple[int, Found, Hit]]] = {}
        for k, found in enumerate(self._plan.found):
            for hit in found.hits:
                if hit.target == number:
                    one = isinstance(target, Op)  # several names are one address
                    root = ", ".join(target.names) if one else hit.root
                    groups.setdefault(root, []).append((k, found, hit))
        places = {}
        for root, group in groups.items():
            values = list(together(root, group))
            places[root] = values[0] if len(values) == 1 else tuple(values)
        return places
