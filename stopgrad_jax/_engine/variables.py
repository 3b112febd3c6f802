"""Find what statements of the source assign to variables.

An execution of a statement is a run of equations that were made while it was running;
`assignment.py` tells which of their results the variable was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Var

from .assignment import Execution, Given, Item, Unclear, begins_again
from .labels import Labels, Spot


class _Anywhere(Labels):
    """Paths through installed libraries, too: their code can be asked for by name."""

    def is_users(self, file: str) -> bool:
        """Take all files with a source for the user's."""
        return not file.startswith("<frozen")


class Variables:
    """Look for variables, and remember those on the way for error messages.

    `statements` maps a target to the statements that assign it, `unclear` to the
    place and the reason for which its value cannot be told; `sourceless` maps files
    whose text is not there or has changed to what is wrong. The targets in `anywhere`
    are looked for in installed libraries, the others in the user's code.
    """

    def __init__(
        self, targets: Mapping[int, Var], fun: Any, anywhere: frozenset[int]
    ) -> None:
        own = {k: var for k, var in targets.items() if k not in anywhere}
        rest = {k: var for k, var in targets.items() if k in anywhere}
        self._own = Labels(fun)
        self._searched = [(self._own, own), *([(_Anywhere(fun), rest)] if rest else ())]
        self._in_path: dict[Any, list[tuple[int, Spot, int, str]]] = {}
        self.known: dict[str, None] = {}
        self.statements: dict[int, dict[Any, str]] = {k: {} for k in targets}
        self.unclear: dict[int, tuple[str, str]] = {}
        self.sourceless: dict[str, str] = {}
        self.files: dict[str, Spot] = {}

    def find(self, jaxpr: Any) -> dict[int, dict[int, list[tuple[int, str]]]]:
        """Return {equation: {result: (target, name) of each variable that it is}}."""
        found: dict[int, dict[int, list[tuple[int, str]]]] = {}
        runs = [run for pair in self._searched for run in self._runs(jaxpr, *pair)]
        users = _users(jaxpr) if runs else {}
        for run in runs:
            run.unclear = run.unclear or run.is_cut_wrongly()
            try:
                index, result = Given(run, users).place()
            except Unclear as why:
                self.unclear.setdefault(run.target, (run.spot.place, str(why)))
                continue
            hits = found.setdefault(index, {}).setdefault(result, [])
            if (run.target, run.name) not in hits:
                hits.append((run.target, run.name))
        return found

    @property
    def missing(self) -> frozenset[int]:
        """The targets that no statement assigns."""
        return frozenset(k for k, found in self.statements.items() if not found)

    def _runs(
        self, jaxpr: Any, labels: Labels, targets: Mapping[int, Var]
    ) -> Iterator[Execution]:
        going: dict[Any, Execution] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            path = labels.path(eqn, labels.nowhere)
            if not path.spots or _is_backward(eqn):
                continue
            item, now = Item(index, eqn, path.spots), {}
            for depth, spot, target, name in self._matches(path, targets):
                assigned = spot.source.assigned(spot.position, name)
                place = assigned or spot.statement
                key = (path.spots[:depth], spot.frame.file, target, name, place)
                run = going.get(key)
                if run is None or self._begins_again(run, item):
                    run = Execution(target, name, spot, depth, assigned, before=run)
                    yield run
                run.items.append(item)
                now[key] = run
            going = now

    def _begins_again(self, run: Execution, item: Item) -> bool:
        value = run.assigned.value if run.assigned else run.spot.position
        again = begins_again(run.items, item, run.depth, value)
        run.unclear = run.unclear or again is None
        return bool(again)

    def _matches(
        self, path: Any, targets: Mapping[int, Var]
    ) -> list[tuple[int, Spot, int, str]]:
        if path not in self._in_path:
            if targets is self._searched[0][1]:
                self._remember(path.spots)
            self._in_path[path] = list(self._match(path.spots, targets))
        return self._in_path[path]

    def _match(
        self, spots: Sequence[Spot], targets: Mapping[int, Var]
    ) -> Iterator[tuple[int, Spot, int, str]]:
        for depth, spot, function, name in _assignments(spots):
            for target, var in targets.items():
                if _is_called(var.label, function, name):
                    statement = spot.statement
                    assert statement is not None
                    line = f"{spot.file}:{statement.line} ({'.'.join(function)})"
                    key = (spot.frame.file, statement.line, statement.value)
                    self.statements[target][key] = line
                    yield depth, spot, target, name

    def _remember(self, spots: Sequence[Spot]) -> None:
        for spot in spots:
            self.files[spot.frame.file] = spot
            if not spot.is_current:
                self.sourceless[spot.file] = spot.expression or "no source text"
        for _, _, function, name in _assignments(spots):
            self.known[name] = None
            self.known[".".join([*function[-2:], name])] = None


def _assignments(
    spots: Sequence[Spot],
) -> Iterator[tuple[int, Spot, Sequence[str], str]]:
    """Yield (depth, spot, parts of the function's name, variable)."""
    for depth, spot in enumerate(spots):
        statement = spot.statement
        if statement is not None and statement.kind == "assignment":
            function = [p for p in spot.function.split(".") if p != "<locals>"]
            for name in statement.targets:
                yield depth, spot, function, name


def _is_called(label: str, function: Sequence[str], name: str) -> bool:
    if label == name:
        return True
    if not label.endswith("." + name):
        return False
    qualification = label[: -len(name) - 1].split(".")
    return list(function[-len(qualification) :]) == qualification


def _is_backward(eqn: Any) -> bool:
    """Tell the equations of a backward pass: they have the lines of the forward one."""
    return "transpose" in _jax.transforms_of(eqn)


def _users(jaxpr: Any) -> dict[Any, list[int]]:
    """Equations that read each variable, without backward passes; -1: a result."""
    users: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        if not _is_backward(eqn):
            for atom in eqn.invars:
                if not isinstance(atom, _jax.Literal):
                    users.setdefault(atom, []).append(index)
    for atom in jaxpr.outvars:
        if not isinstance(atom, _jax.Literal):
            users.setdefault(atom, []).append(-1)
    return users
