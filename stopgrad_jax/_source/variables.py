"""Find what statements of the source assign to variables.

An execution of a statement is a run of equations that were made while it was running;
`assignment.py` tells which of their results the variable was given.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Var

from .assignment import Assignment, Unclear
from .bindings import Binding, Function, is_within
from .executions import Execution, Item, begins_again, is_inside, level_of
from .labels import Labels, Spot, function_of, is_comprehension
from .repeats import Again
from .roles import is_backward
from .rounds import reads_another
from .watched import Seen


class Apart(Spot):
    """A part of a generator that is gone through elsewhere than where it is written."""


class Running(Labels):
    """Paths with the statement that was running in each function.

    That of a generator expression is where it is gone through.
    """

    def __init__(self, fun: Any) -> None:
        super().__init__(fun)
        self._apart: dict[_jax.Frame, Spot] = {}

    def _push(self, spots: list[Spot], frame: _jax.Frame) -> None:
        if is_comprehension(frame.code):
            spot, above = self._spot(frame, function_of(frame)), spots[-1:]
            same = above and above[0].function == spot.function
            if not same or above[0].statement != spot.statement:
                new = Apart(frame, spot.function)
                spots.append(self._apart.setdefault(frame, new))
                return
        super()._push(spots, frame)


class Anywhere(Running):
    """Paths through installed libraries, too: their code can be asked for by name."""

    def is_users(self, file: str) -> bool:
        """Take all files with a source for the user's."""
        return not file.startswith("<frozen")


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A statement that assigns, where it was seen running."""

    spot: Spot
    binding: Binding

    @property
    def key(self) -> Any:
        """Equal for the same statement and variable."""
        return self.spot.frame.file, self.binding.place, self.binding.name

    @property
    def function(self) -> Function:
        """The function that it is in."""
        return self.spot.source.function(self.binding.place)

    @property
    def path(self) -> list[str]:
        """The names of the classes and functions that it is in, outermost first."""
        return [p for p in self.spot.function.split(".") if p != "<locals>"]

    @property
    def nth(self) -> int:
        """Which of the statements of its function that assign the variable it is."""
        return self.function.statements(self.binding.name).index(self.binding)

    def is_meant(self, var: Var) -> bool:
        """Tell whether an address means this statement."""
        if not is_called(var.label, self.path, self.binding.name):
            return False
        if var.line is not None:
            line, _, end_line, _ = self.binding.place
            if not line <= var.line <= end_line:
                return False
        if var.nth is None:
            return True
        count = len(self.function.statements(self.binding.name))
        return var.nth in (self.nth, self.nth - count)

    @property
    def label(self) -> str:
        """The variable with its function, and that with its class."""
        parts = self.path[-2 if self.function.bound else -1 :]
        return ".".join([*parts, self.binding.name])

    @property
    def text(self) -> str:
        """`file:line (function): the statement`, as it is printed."""
        code = self.spot.source.expression(self.binding.place)
        code = code if len(code) <= 60 else code[:57] + "..."
        place = f"{self.spot.file}:{self.binding.place[0]}"
        return f"{place} ({'.'.join(self.path)}): {code}"


class Variables:
    """Look for variables, and remember those on the way for error messages.

    `known` maps a key to each statement of the user's code that assigns. `statements`
    has those that a target means, `given` the results that they are, `unclear` the
    place and the reason where what one assigned cannot be told; `sourceless` maps files
    whose text is not there or has changed to what is wrong, `functions` has a place in
    each function that ran. The targets in `anywhere` are looked for in installed
    libraries, the others in the user's code.
    """

    def __init__(
        self, targets: Mapping[int, Var], fun: Any, anywhere: frozenset[int]
    ) -> None:
        own = {k: var for k, var in targets.items() if k not in anywhere}
        rest = {k: var for k, var in targets.items() if k in anywhere}
        self._own = Running(fun)
        self._searched = [(self._own, own), *([(Anywhere(fun), rest)] if rest else ())]
        self._in_path: dict[Any, list[tuple[int, Site, int]]] = {}
        self.known: dict[Any, Site] = {}
        self.statements: dict[int, dict[Any, Site]] = {k: {} for k in targets}
        self.unclear: dict[int, dict[Any, tuple[str, str]]] = {k: {} for k in targets}
        self.sourceless: dict[str, str] = {}
        self.functions: dict[Any, Spot] = {}
        self.given: dict[int, dict[Any, set[Any]]] = {k: {} for k in targets}
        self._programs: dict[Any, int] = {}  # of each variable that was met

    def find(self, jaxpr: Any) -> dict[Any, list[tuple[int, str, float]]]:
        """Return {result: (target, name, level) of each variable that it is}.

        The level is that of its function in the stack.
        """
        found: dict[Any, list[tuple[int, str, float]]] = {}
        runs = [run for pair in self._searched for run in self._runs(jaxpr, *pair)]
        users = users_of(jaxpr) if runs else {}
        for run in runs:
            run.unclear = run.unclear or run.is_cut_wrongly()
            site = Site(run.spot, run.binding)
            try:
                index, result = Assignment(run, users).place()
            except Unclear as why:
                reason = (run.spot.place, str(why))
                self.unclear[run.target].setdefault(site.key, reason)
                continue
            stack = _jax.stack_of(run.items[0].eqn)
            level = level_of(stack, run.items[0], run.depth)
            hits = found.setdefault(jaxpr.eqns[index].outvars[result], [])
            if (run.target, run.binding.name) not in [hit[:2] for hit in hits]:
                hits.append((run.target, run.binding.name, level or 0))
            given = self.given[run.target].setdefault(site.key, set())
            given.add(jaxpr.eqns[index].outvars[result])
        self._refuse_rounds(jaxpr, runs, found, users)
        results = (v for eqn in jaxpr.eqns for v in eqn.outvars)
        self._programs.update(dict.fromkeys([*jaxpr.invars, *results], id(jaxpr)))
        return found

    def compare(self, seen: Sequence[Seen]) -> None:
        """Note the statements that were seen to assign other arrays than were found.

        It is not known of programs that JAX made of others.
        """
        for target, sites in self.statements.items():
            for site in sites.values():
                events = self._events(seen, site)
                mine = self.assigned(seen, site)
                there = {self._programs[v] for v in mine}
                found = self.given[target].get(site.key, ())
                given = {v for v in found if self._programs[v] in there}
                why = ""
                if mine != given:
                    why = "it was seen to be given other arrays than its text tells"
                elif events and not any(s.is_array for s in events):
                    why = "it is an object, not one array"
                if why:
                    self.unclear[target].setdefault(site.key, (site.spot.place, why))

    def assigned(self, seen: Sequence[Seen], site: Site) -> set[Any]:
        """Return the results of this program that a statement was seen to assign."""
        events = self._events(seen, site)
        return {s.variable for s in events} & self._programs.keys()

    @staticmethod
    def _events(seen: Sequence[Seen], site: Site) -> list[Seen]:
        file, name, place = site.spot.frame.file, site.binding.name, site.binding.place
        every = site.function.statements(name)
        others = [b for b in every if b is not site.binding]
        found = [
            s
            for s in seen
            if (s.file, s.name, s.function) == (file, name, "")
            and s.line in site.binding.lines
        ]
        # Where they share a line, or one is in another, it is the column that tells.
        if any(site.binding.lines & other.lines for other in others):
            inner = [b.place for b in others if is_within(b.place, place)]
            found = [s for s in found if is_within(s.place, place)]
            return [s for s in found if not any(is_within(s.place, p) for p in inner)]
        return found

    def _refuse_rounds(
        self,
        jaxpr: Any,
        runs: Sequence[Execution],
        found: Mapping[Any, Sequence[tuple[int, str, float]]],
        users: Mapping[Any, Sequence[int]],
    ) -> None:
        """Note the statements of which an execution made no operation."""
        # One execution stands for its statement: all equations are looked at.
        one = {(r.target, r.binding.place, r.spot.frame.code): r for r in runs}
        edited = {v: _jax.edited_at(e) for e in jaxpr.eqns for v in e.outvars}
        for labels, targets in self._searched:
            mine = [r for r in one.values() if r.target in targets]
            paths = [labels.path(e, labels.nowhere) for e in jaxpr.eqns if mine]
            items = [
                Item(k, eqn, path.spots)
                for k, (eqn, path) in enumerate(zip(jaxpr.eqns, paths, strict=False))
                if path.spots and not is_backward(eqn)
            ]
            for run in mine:
                given = {
                    v for v, h in found.items() if any(t == run.target for t, *_ in h)
                }  # and what an earlier edit of it put in its place
                given |= {v for v, a in edited.items() if a == run.binding.name}
                if reads_another(run, items, frozenset(given), users):
                    why = "in another round or call no operation made what it is given"
                    key = Site(run.spot, run.binding).key
                    self.unclear[run.target].setdefault(key, (run.spot.place, why))

    @property
    def missing(self) -> frozenset[int]:
        """The targets that no statement assigns."""
        return frozenset(k for k, found in self.statements.items() if not found)

    def quiet(self, target: int, var: Var) -> list[Site]:
        """Statements that may have given it another array and made no equation."""
        sites, found = self.statements[target], dict[Any, Site]()
        for site in sites.values():
            for other in site.function.statements(site.binding.name):
                one = Site(site.spot, other)
                if one.key not in sites and other.quietly == "another":
                    if one.is_meant(var) and not other.excludes(site.binding):
                        found[one.key] = one
        return list(found.values())

    def is_clear(self, target: int, var: Var) -> bool:
        """Tell whether one statement is meant, and what it assigned."""
        count = len(self.statements[target]) + len(self.quiet(target, var))
        return count == 1 and not self.unclear[target]

    def _runs(
        self, jaxpr: Any, labels: Labels, targets: Mapping[int, Var]
    ) -> Iterator[Execution]:
        """Yield the executions of the statements that are meant, as they begin.

        An execution is over with the first equation that it did not make; its items are
        all there once this has gone through the whole program.
        """
        going: dict[Any, Execution] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            path = labels.path(eqn, labels.nowhere)
            # These interrupt no statement: an edit stands in the middle of one.
            if not path.spots or is_backward(eqn) or is_edit(eqn):
                continue
            item, now = Item(index, eqn, path.spots), {}
            for depth, site, target in self._matches(path, targets):
                key = (path.spots[:depth], target, *site.key)
                run = going.get(key)
                if run is None or self._begins_again(run, item, jaxpr):
                    run = Execution(target, site.binding, site.spot, depth, before=run)
                    yield run
                run.items.append(item)
                now[key] = run
            going = now

    def _begins_again(self, run: Execution, item: Item, jaxpr: Any) -> bool:
        value = run.assigned.value if run.assigned else run.spot.position
        rest = itertools.islice(jaxpr.eqns, item.index, None)
        again = begins_again(run.items, item, run.depth, value, rest)
        run.unclear = run.unclear or again is Again.UNKNOWN
        return again is Again.YES

    def _matches(
        self, path: Any, targets: Mapping[int, Var]
    ) -> list[tuple[int, Site, int]]:
        if path not in self._in_path:
            sites = list(_assignments(path.spots))
            # Messages name variables of the user's code, and not those of libraries.
            if targets is self._searched[0][1]:
                self._remember(path.spots, sites)
            self._in_path[path] = list(self._meant(sites, targets))
        return self._in_path[path]

    def _meant(
        self, sites: Sequence[tuple[int, Site]], targets: Mapping[int, Var]
    ) -> Iterator[tuple[int, Site, int]]:
        for depth, site in sites:
            for target, var in targets.items():
                if site.is_meant(var):
                    self.statements[target][site.key] = site
                    yield depth, site, target

    def _remember(
        self, spots: Sequence[Spot], sites: Sequence[tuple[int, Site]]
    ) -> None:
        for spot in spots:
            if spot.is_current:
                body = spot.source.function(spot.position).body
                self.functions.setdefault((spot.frame.file, body), spot)
            else:
                self.sourceless[spot.file] = spot.expression or "no source text"
        self.known.update((site.key, site) for _, site in sites)


def _assignments(spots: Sequence[Spot]) -> Iterator[tuple[int, Site]]:
    for depth, spot in enumerate(spots):
        if spot.is_current:
            for binding in spot.source.assignments(spot.position):
                # Gone through elsewhere, a generator runs only a `:=` of its own.
                if not isinstance(spot, Apart) or is_inside(binding.place, spot):
                    yield depth, Site(spot, binding)


def is_called(label: str, path: Sequence[str], name: str) -> bool:
    """Tell whether a label means the variable `name` of the function at `path`."""
    if label == name:
        return True
    if not label.endswith("." + name):
        return False
    qualification = label[: -len(name) - 1].split(".")
    return list(path[-len(qualification) :]) == qualification


def is_edit(eqn: Any) -> bool:
    """Tell what an edit has put in the place of a value: it has the value's lines."""
    return "edit" in _jax.transforms_of(eqn)


def users_of(jaxpr: Any, backward: bool = False) -> dict[Any, list[int]]:
    """Equations that read each variable; -1: a result.

    Those of a backward pass only if asked: no assignment of the source is one.
    """
    users: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        if backward or not is_backward(eqn):
            for atom in eqn.invars:
                if not isinstance(atom, _jax.Literal):
                    users.setdefault(atom, []).append(index)
    for atom in jaxpr.outvars:
        if not isinstance(atom, _jax.Literal):
            users.setdefault(atom, []).append(-1)
    return users
