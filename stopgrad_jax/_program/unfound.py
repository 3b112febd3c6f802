"""Why `sg.var` finds no value, or more than one: said with lines and what to write.

What an error says to write has been tried: it means one value of this program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Address, Point, Var, joined, nearest
from stopgrad_jax._errors import AddressError, quoted, rows, wrong
from stopgrad_jax._source.bindings import STATEMENT, Binding, Function
from stopgrad_jax._source.labels import Spot
from stopgrad_jax._source.variables import Site, Variables, is_called
from stopgrad_jax._source.watched import Seen

from .control import control
from .parameters import Parameter, Parameters
from .trace import Traced

_IN_THE_SOURCE = "sg.name in the source there"


@dataclasses.dataclass(frozen=True)
class Looked:
    """What was seen while variables were looked for.

    `working` returns those of some addresses that select something here, `assigned`
    what is found of a variable, and what is seen of it and of another one.
    """

    traced: Traced
    variables: Variables
    parameters: Sequence[Parameters]
    working: Callable[[Iterable[Address]], list[Any]]
    assigned: Callable[[Var, str], tuple[Variables | None, Sequence[Seen]]]

    def is_clear(self, target: int, var: Var) -> bool:
        """Tell whether an address means one value."""
        if self.variables.statements[target]:
            return self.variables.is_clear(target, var)
        told = [p for p in self.parameters if target in p.found]
        places = {place for p in told for place in p.found[target]}
        unclear = any(p.unclear[target] for p in told)
        return len(places) == 1 and not unclear

    def told(self, target: int, var: Var) -> list[str]:
        """Return, as they are written, the addresses of what a label may mean."""
        if self.is_clear(target, var):
            return [repr(v) for v in self.working([var])]
        return self.addresses(var, list(self.variables.statements[target].values()))

    @property
    def labels(self) -> list[str]:
        """Every variable that a statement assigns, with and without its function."""
        every = self.variables.known.values()
        return list({label: None for site in every for label in _all(site)})

    def refuse(self, targets: Sequence[Any], called: str) -> None:
        """Raise where a variable cannot be told, or more than one is meant."""
        for target in self.variables.statements:
            var = targets[target]
            error = self._refusal(target, var, f"{called}: address {var!r}")
            if error is not None:
                raise error

    def _refusal(self, target: int, var: Var, called: str) -> AddressError | None:
        """Return the error for a variable that is not clear; None if it is one value.

        Statements come before parameters, and that there are several before what cannot
        be told of one: the address is to be made clear first.
        """
        variables = self.variables
        sites = [*variables.statements[target].values(), *variables.quiet(target, var)]
        if len(sites) > 1:
            return self._several(target, var, sites, called)
        for place, why in variables.unclear[target].values():
            return _unclear(f"{called} ({place})", why)
        if sites:
            return None
        for parameters in self.parameters:
            if target not in parameters.found:
                continue
            places = {**parameters.found[target], **parameters.unclear[target]}
            own = parameters.own.get(target)
            if len(places) + (own is not None) > 1:
                return self._several_parameters(var, own, list(places), called)
            for place, why in parameters.unclear[target].items():
                return _unclear(f"{called} ({place.place}), a parameter", why)
            if own is not None:
                return self._own(own, called)
        return None

    # Several --------------------------------------------------------------------

    def _several(
        self, target: int, var: Var, sites: Sequence[Site], called: str
    ) -> AddressError:
        """Return the error for several statements, with an address of each."""
        sites = sorted(sites, key=lambda s: (s.spot.file, s.binding.place))
        found = self.variables.statements[target]
        why = {key: w for key, (_, w) in self.variables.unclear[target].items()}

        def note(site: Site) -> str:
            if site.key not in found:
                return ", which made no operation: it may have run"
            return f", and {why[site.key]}" if site.key in why else ""

        return wrong(
            AddressError,
            called,
            "one statement must assign the variable, or the address say which",
            rows([f"{len(sites)}:", *(s.text + note(s) for s in sites)], 7),
            rows(self.addresses(var, sites) or [_IN_THE_SOURCE]),
        )

    def addresses(self, var: Var, sites: Sequence[Site]) -> list[str]:
        """Return an address of each statement that has one, as it is to be written."""
        every = {site.key: list(_candidates(var, site)) for site in sites}
        works = self.working(v for each in every.values() for v in each)
        lines = []
        for site in sites:
            mine = [v for v in every[site.key] if v in works]
            # What works here may still mean another of these statements, too.
            mine = [v for v in mine if [s for s in sites if s.is_meant(v)] == [site]]
            # Else by line or by number: the one changes with all text above it, the
            # other with each assignment before it.
            alone = [v for v in mine if v.line is None and v.nth is None]
            by_line = [v for v in mine if v.line is not None]
            by_number = [v for v in mine if v.nth is not None]
            best = alone[:1] or [*by_line[:1], *by_number[:1]]
            if best:
                lines.append(" or ".join(map(repr, best)))
        return lines

    def _several_parameters(
        self, var: Var, own: str | None, places: Sequence[Parameter], called: str
    ) -> AddressError:
        functions = [f"{p.place} ({'.'.join(p.path)})" for p in places]
        if own is not None:
            functions.append(f"{self.traced.name}, as its argument")
        works = self.working(Var(place.label) for place in places)
        write = [*map(repr, works), *(self._argument(own) if own else ())]
        return wrong(
            AddressError,
            called,
            "one function must have a parameter of that name, or the address say which",
            rows([f"{len(functions)}:", *functions], 7),
            rows(write or [_IN_THE_SOURCE]),
        )

    def _own(self, name: str, called: str) -> AddressError:
        """A parameter of the traced function has an address of its own."""
        write = " or ".join(self._argument(name))
        return wrong(
            AddressError,
            called,
            "a parameter is a variable of the functions that are called inside",
            f'"{name}", an argument of {self.traced.name} itself',
            write or _IN_THE_SOURCE,
        )

    def _argument(self, name: str) -> list[str]:
        """Return, as it is written, an address of an argument and of nothing else.

        Where a point has the same name, that is the position, and it may be the point
        that is meant.
        """
        if name not in self.traced.arguments:
            return []
        if self.working([name]):
            return [f'"{name}"']
        place = self.traced.by_position(name)
        by_position = self.working([place]) if place is not None else []
        write = [f"{as_code(a)} for the argument" for a in by_position]
        write += [f"{a!r} for the point" for a in self.working([Point(name)])]
        return write if by_position else [*write, "another name for the point"]

    # None -----------------------------------------------------------------------

    def no_variable(self, var: Var, called: str) -> AddressError:
        """Return the error for a variable that no statement with equations assigns."""
        expected = (
            f"it must be a variable of {self.traced.name} or of a function that it "
            "calls"
        )
        whole = Var(var.label)
        sites = [s for s in self.variables.known.values() if s.is_meant(whole)]
        bound = list(self._bound(var))
        if not bound and sites:
            which = "line" if var.line is not None else "nth"
            came = [f"{which}={getattr(var, which)}, where none of these is meant:"]
            came += [site.text for site in sites]
            write = self.addresses(whole, sites)
        elif bound:
            came, write = self._quiet(bound)
        else:
            came, write = self._unknown(var)
        return wrong(
            AddressError,
            called,
            expected,
            rows(came, 7),
            rows(write or [_IN_THE_SOURCE]),
        )

    def _bound(self, var: Var) -> Iterator[tuple[Spot, Function, Binding]]:
        """Yield what binds a variable in the functions that ran, and is meant."""
        alone = (var.line, var.nth) == (None, None)
        for spot in self.variables.functions.values():
            function = spot.source.function(spot.position)
            for binding in function.bindings:
                site = Site(spot, binding)
                called = is_called(var.label, site.path, binding.name)
                is_statement = binding.how == STATEMENT
                if called and (site.is_meant(var) if is_statement else alone):
                    yield spot, function, binding

    def _quiet(
        self, bound: Sequence[tuple[Spot, Function, Binding]]
    ) -> tuple[list[str], list[str]]:
        """Say what became of a variable that no operation makes."""
        came, candidates = list[str](), list[Any]()
        for spot, function, binding in bound:
            text = Site(spot, binding).text.rstrip(":")
            came.append(text + _HOW.get(binding.how, ", which is no array"))
            if binding.how == STATEMENT and binding.assigned is not None:
                alias = spot.source.name(binding.assigned.value)
                if alias:
                    candidates += self._same(Site(spot, binding), function, alias)
        return came, [as_code(a) for a in self.working(candidates)[-1:]]

    def _same(self, site: Site, function: Function, alias: str) -> Iterator[Address]:
        """Yield what may be the arrays of a statement that gives one another name.

        A name that is assigned to must be seen to have been these, and no others.
        """
        around = site.label[: -len(site.binding.name)]
        own = function.line == self._own_line and alias in self.traced.arguments
        count = len(function.statements(alias))
        labels = [Var(alias), *(Var(around + alias, nth=k) for k in range(count))]
        # Of several statements the bare name means none by itself.
        for var in labels if count < 2 else labels[1:]:
            variables, seen = self.assigned(var, site.binding.name)
            if variables is not None:
                mine = variables.assigned(seen, site)
                if mine and mine == set().union(*variables.given[0].values()):
                    yield var
        if not function.binding(alias):
            yield Var(around + alias)
            if own:
                place = self.traced.by_position(alias)
                if place is not None:  # for where a point has that name, too
                    yield place
                yield alias

    @property
    def _own_line(self) -> int:
        return getattr(getattr(self.traced.fun, "__code__", None), "co_firstlineno", -1)

    def _unknown(self, var: Var) -> tuple[list[str], list[str]]:
        sites = list(self.variables.known.values())
        known = {label: None for s in sites for label in _all(s)}
        name = var.label.split(".")[-1]
        elsewhere = [s for s in sites if s.binding.name == name]
        # The attribute of that name, `self.h`, where there is no such variable.
        ends = [s for s in sites if s.binding.name.endswith(f".{name}")]
        elsewhere = elsewhere or ends
        if elsewhere:
            of = dict[str, list[str]]()
            for site in elsewhere:
                of.setdefault(site.binding.name, []).append(".".join(site.path))
            came = [f"{n}, in {', '.join(sorted(set(fs)))}" for n, fs in of.items()]
        else:
            names = self._listed(sites)
            none = "none that can be addressed" if sites and not names else ""
            came = ["variables " + (none or quoted(names))]
        came += [
            f"no variables of {file}: {what.strip('()')}"
            for file, what in self.variables.sourceless.items()
        ]
        labels = [label for site in elsewhere for label in _all(site)]
        labels += [] if elsewhere else self._parameters_called(name)
        near = [*labels, *nearest(var.label, known), *nearest(name, known)]
        works = self.working(map(Var, dict.fromkeys(near)))
        write = [repr(v) for v in works[:1]] or self._by_statement(elsewhere)
        if not write and self.variables.sourceless:
            write = ["sg.name in the source; sg.var reads the source text"]
        return came, write

    def _listed(self, sites: Sequence[Site]) -> list[str]:
        """Return the variables of statements; of attributes, those with an address.

        The shortest that means one statement, or else the name alone.
        """
        every = {
            site.key: [Var(site.binding.name), *_candidates(Var(name), site)]
            for site in sites
            if "." in (name := site.binding.name)
        }
        works = self.working(v for mine in every.values() for v in mine)
        listed = list[str]()
        for site in sites:
            mine = [v for v in every.get(site.key, ()) if v in works]
            alone = [v.label for v in mine if (v.line, v.nth) == (None, None)]
            if mine or site.key not in every:
                listed += alone[:1] or [site.binding.name]
        return listed

    def _by_statement(self, sites: Sequence[Site]) -> list[str]:
        """Return an address of each statement, where no label means one of them."""
        of = dict[str, list[Site]]()
        for site in sites:
            of.setdefault(site.binding.name, []).append(site)
        return [a for n, mine in of.items() for a in self.addresses(Var(n), mine)]

    def _parameters_called(self, name: str) -> list[str]:
        """Return the labels of parameters of that name, in libraries too."""
        labels = dict[str, None]()
        for eqn, _ in every_eqn(self.traced.jaxpr, ""):
            for code, _ in _jax.stack_of(eqn):
                count = code.co_argcount + code.co_kwonlyargcount
                if name in code.co_varnames[:count]:
                    path = [p for p in code.co_qualname.split(".") if p != "<locals>"]
                    if not _jax.is_own(code.co_filename):
                        labels[".".join([*path[-2:], name])] = None
        return list(labels)[:8]


def every_eqn(jaxpr: Any, path: str) -> Iterator[tuple[Any, str]]:
    """Yield each equation, in nested programs too, and the scopes that it is in."""
    for eqn in jaxpr.eqns:
        here = joined(path, _jax.scope_of(eqn))
        yield eqn, here
        inner = control(eqn)
        for body in inner.bodies if inner else ():
            yield from every_eqn(body.jaxpr, here)


_HOW = {
    STATEMENT: ", which made no operation: another name for an array, or not run",
    "for": ", where a loop hands over one after the other",
    "in": ", where a comprehension hands over one after the other",
    "with": ", where a context manager hands it over",
}


def _unclear(called: str, why: str) -> AddressError:
    return wrong(
        AddressError,
        called,
        "it must be clear which array the variable is given",
        why,
        f"{_IN_THE_SOURCE}, or the variable of a statement that computes one array",
    )


def _candidates(var: Var, site: Site) -> Iterator[Var]:
    """Yield addresses that may mean a statement, the shortest first."""
    labels = _all(site)
    yield from (Var(label) for label in labels[1:])
    line = site.binding.place[0]
    yield from (Var(label, line=line) for label in dict.fromkeys((var.label, *labels)))
    yield from (Var(label, nth=site.nth) for label in labels[1:])


def _all(site: Site) -> list[str]:
    """Return the labels of a statement's variable, the short one first."""
    name = site.binding.name
    return list(dict.fromkeys((name, site.label, ".".join([*site.path, name]))))


def as_code(address: Address) -> str:
    return f'"{address}"' if isinstance(address, str) else repr(address)
