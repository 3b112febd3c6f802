"""Find what functions were handed, and give it a name in the program.

A parameter is no result of an equation. Where the body of a function is a jaxpr of its
own, it is an input of that. Else it is what `handed.py` tells that the argument in the
call was, and that is believed only where the function then reads it in an expression
that spells the parameter. It is named there, for the function alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Var
from stopgrad_jax._places import printed_file
from stopgrad_jax._source.assignment import Unclear
from stopgrad_jax._source.bindings import Function
from stopgrad_jax._source.calls import Call, Calls
from stopgrad_jax._source.executions import Item, function_level
from stopgrad_jax._source.handed import Handed, Spread
from stopgrad_jax._source.labels import Labels, Spot
from stopgrad_jax._source.roles import is_backward
from stopgrad_jax._source.routes import Routes
from stopgrad_jax._source.variables import is_called
from stopgrad_jax._source.watched import Seen

from .anew import map_jaxprs, naming, reading, with_eqns
from .control import control
from .origins import def_line, made_in, origin_of_traced, path_of, spread_of
from .trace import Traced


class ParameterName(str):
    """The name that a value is given; no address matches it but `sg.var`."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a function: the names around it, and the line of its `def`."""

    path: tuple[str, ...]
    name: str
    file: str
    line: int

    @property
    def label(self) -> str:
        """Its qualified name."""
        return ".".join((*self.path, self.name))

    @property
    def place(self) -> str:
        """`file:line`, as it is printed."""
        return f"{printed_file(self.file)}:{self.line}"

    def is_meant(self, var: Var) -> bool:
        """Tell whether an address means this parameter."""
        lines = (None, self.line)
        called = is_called(var.label, self.path, self.name)
        return called and var.nth is None and var.line in lines


class _Shown(Labels):
    """Paths with those functions of libraries that an address names."""

    def __init__(self, fun: Any, labels: Iterable[str]) -> None:
        super().__init__(fun)
        around = [label.split(".")[:-1] for label in labels]
        self._asked = [parts for parts in around if parts]

    def shows(self, frame: _jax.Frame) -> bool:
        """Take a function that is asked for as the user's."""
        if not self._asked:
            return super().shows(frame)
        parts = [p for p in frame.function.split(".") if p != "<locals>"]
        asked = any(parts[-len(a) :] == a for a in self._asked)
        return asked or super().shows(frame)


@dataclasses.dataclass(frozen=True, eq=False)
class _Naming:
    """A variable that is to be named for some equations, and for the results if `own`.

    That is so of the parameter of the function that a jaxpr was traced from.
    """

    var: Any
    start: int
    indices: frozenset[int]
    name: ParameterName
    targets: list[int]
    own: bool = False


@dataclasses.dataclass(frozen=True)
class _Meant:
    """A parameter that targets mean; its function is so deep in a path of calls."""

    depth: int
    function: Function
    place: Parameter
    targets: list[int]


@dataclasses.dataclass(frozen=True)
class _CallsIn:
    """The calls in a jaxpr, by the path and the parameter; what is backward apart."""

    items: list[Item]
    calls: Calls
    meant: dict[Any, _Meant] = dataclasses.field(default_factory=dict)
    backward: dict[Any, list[int]] = dataclasses.field(default_factory=dict)


class Parameters:
    """Look for parameters, and name what they were handed.

    `found` holds those that a target means, `unclear` the place and the reason where
    one cannot be told, `own` the parameters of the traced function itself. `named` maps
    the results of new equations to the (target, name) of each parameter that they are.
    `where`: in the user's files "here", also in the package of the traced function "at
    home", or in functions of libraries that an address names "anywhere".
    """

    def __init__(
        self, targets: Mapping[int, Var], traced: Traced, where: str = "here"
    ) -> None:
        self._targets, self._traced = targets, traced
        labels = [v.label for v in targets.values()] if where == "anywhere" else []
        # `model.apply` is a library's: its own functions are not the user's here.
        fun = traced.fun if where == "at home" else None
        self._labels = _Shown(fun, labels)
        self._changed: dict[int, tuple[Any, Any]] = {}
        self._in_path: dict[Any, list[_Meant]] = {}
        self.found: dict[int, dict[Parameter, None]] = {k: {} for k in targets}
        self.unclear: dict[int, dict[Parameter, str]] = {k: {} for k in targets}
        self.own: dict[int, str] = {}
        self.named: dict[Any, list[tuple[int, str]]] = {}
        # The variables of all programs, and those that parameters were told to be.
        self._every = set[Any]()
        self._given: dict[tuple[int, Parameter], set[Any]] = {}

    def compare(self, seen: Iterable[Seen]) -> None:
        """Note the parameters that were seen to be handed more than was found.

        So it is in a call that makes no operation of its own.
        """
        for one in (s for s in seen if s.function and s.variable in self._every):
            path = tuple(p for p in one.function.split(".") if p != "<locals>")
            for target, places in self.found.items():
                for place in places if target not in self.own else ():
                    mine = (place.file, place.path, place.name)
                    given = self._given.get((target, place), ())
                    if mine == (one.file, path, one.name) and one.variable not in given:
                        why = "a call that makes no operation is handed another array"
                        self.unclear[target].setdefault(place, why)

    def program(self) -> Any:
        """Return the traced program with names for what was found."""
        jaxpr = self._traced.jaxpr
        return self._with_names(
            jaxpr, origin_of_traced(self._traced), spread_of(self._traced)
        )

    def _with_names(
        self, jaxpr: Any, origin: _jax.Origin | None, spread: Spread | None
    ) -> Any:
        """Name what is found in a jaxpr; `spread` is None for a nested one."""
        eqns = [
            map_jaxprs(eqn, self._inside) if control(eqn) else eqn for eqn in jaxpr.eqns
        ]
        self._every |= {*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)}
        namings = list(self._inputs(jaxpr, origin)) if spread is None else []
        namings += self._called(jaxpr, origin, spread)
        if not namings and all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True)):
            return jaxpr
        return self._named(jaxpr, eqns, namings)

    def _inside(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self._changed:
            new = self._with_names(jaxpr, _jax.origin_of(jaxpr), None)
            self._changed[id(jaxpr)] = jaxpr, new  # the old one is kept: so is its id
        return self._changed[id(jaxpr)][1]

    # What is found --------------------------------------------------------------

    def _inputs(self, jaxpr: Any, origin: _jax.Origin | None) -> Iterator[_Naming]:
        """Parameters of the function that a nested jaxpr was traced from."""
        if origin is None or not jaxpr.eqns or not self._is_shown(origin):
            return
        path = path_of(origin)
        indices = made_in(jaxpr, origin)
        for spelled, k in origin.inputs.items():
            name = spelled.split("[")[0].split(".")[0]
            place = Parameter(path, name, origin.file, def_line(origin))
            targets = [t for t, var in self._targets.items() if place.is_meant(var)]
            for target in targets:
                if name != spelled:
                    self.unclear[target][place] = "it is a container of arrays"
                else:
                    self._found(target, place, jaxpr.invars[k])
            if targets and name == spelled:
                name = ParameterName(place.label)
                yield _Naming(jaxpr.invars[k], 0, indices, name, targets, own=True)

    def _found(self, target: int, place: Parameter, var: Any) -> None:
        self.found[target][place] = None
        self._given.setdefault((target, place), set()).add(var)

    def _is_shown(self, origin: _jax.Origin) -> bool:
        frame = _jax.Frame(None, origin.file, origin.name, origin.line)
        return self._labels.shows(frame)

    def _called(
        self,
        jaxpr: Any,
        origin: _jax.Origin | None,
        spread: Spread | None,
    ) -> Iterator[_Naming]:
        """Parameters of functions that are called while a jaxpr is traced."""
        seen = self._calls_in(jaxpr)
        if not seen.meant:
            return
        handed = Handed(jaxpr, seen.items, origin, spread)
        by_index = {item.index: item for item in seen.items}
        for key, found in seen.calls.found.items():
            meant, handed_on = seen.meant[key], dict[Any, Call]()
            place, targets = meant.place, meant.targets
            for call in found:
                run = [by_index[k] for k in call.indices]
                # What the traced function itself is handed are its arguments, which
                # have addresses.
                if meant.depth == 0 and handed.is_origin(run[0].spots[0]):
                    if spread is not None:
                        self.own.update(dict.fromkeys(targets, place.name))
                    continue
                try:
                    var = self._told(handed, call, run, meant)
                    again = handed_on.setdefault(var, call) is not call
                    # The derivatives that are taken in the call read it, too.
                    backward = seen.backward.get(key, ())
                    read = {k for k in backward if var in jaxpr.eqns[k].invars}
                    # A backward pass does not tell which of the calls it is of.
                    if again and read:
                        raise Unclear("several calls are handed it, and a derivative")
                except Unclear as why:
                    for target in targets:
                        self.unclear[target].setdefault(place, str(why))
                    continue
                for target in targets:
                    self._found(target, place, var)
                indices, name = {*call.indices, *read}, ParameterName(place.label)
                start = call.indices[0]
                yield _Naming(var, start, frozenset(indices), name, targets)

    def _calls_in(self, jaxpr: Any) -> _CallsIn:
        """Return the calls in a jaxpr of functions with a parameter that is meant."""
        seen = _CallsIn([], Calls(jaxpr.eqns))
        for index, eqn in enumerate(jaxpr.eqns):
            path = self._labels.path(eqn, self._labels.nowhere)
            if not path.spots:
                continue
            if path not in self._in_path:
                self._in_path[path] = list(self._meant(path.spots))
            every = [((path.spots[: m.depth], m.place), m) for m in self._in_path[path]]
            if is_backward(eqn):
                for key, _ in every:
                    seen.backward.setdefault(key, []).append(index)
                continue
            item = Item(index, eqn, path.spots)
            seen.items.append(item)
            seen.calls.step()
            for key, meant in every:
                stack = _jax.stack_of(eqn)
                level = function_level(stack, item, meant.depth)
                if level is not None:
                    seen.meant[key] = meant
                    seen.calls.add(key, index, eqn, stack, level)
        return seen

    def _meant(self, spots: Sequence[Spot]) -> Iterator[_Meant]:
        for depth, spot in enumerate(spots):
            if spot.is_current:
                function = spot.source.function(spot.position)
                path = [p for p in spot.function.split(".") if p != "<locals>"]
                for name in function.parameters:
                    place = Parameter(tuple(path), name, spot.frame.file, function.line)
                    meant = [t for t, v in self._targets.items() if place.is_meant(v)]
                    if meant:
                        yield _Meant(depth, function, place, meant)

    @property
    def silent(self) -> frozenset[int]:
        """The targets that mean no parameter."""
        return frozenset(self._targets) - self.told - self.untold

    @property
    def told(self) -> frozenset[int]:
        """The targets that mean a parameter whose value is found or that has one."""
        return frozenset(self.own) | {k for k, found in self.found.items() if found}

    @property
    def untold(self) -> frozenset[int]:
        """The targets that mean parameters of which none could be told."""
        return frozenset(k for k, why in self.unclear.items() if why) - self.told

    def forget(self, targets: Iterable[int]) -> None:
        """Take back that targets could not be told: they were found elsewhere."""
        for target in targets:
            if target in self.untold:
                self.unclear[target].clear()

    @staticmethod
    def _told(handed: Handed, call: Call, run: Sequence[Item], meant: _Meant) -> Any:
        """Return the variable that a parameter was in one call."""
        depth, function, name = meant.depth, meant.function, meant.place.name
        if call.is_unclear:
            raise Unclear("it cannot be told where one call of it ends")
        var = handed.value(run[0], depth, function, name)
        if not handed.reads(run, depth, name, var):
            raise Unclear("no operation of the function reads it as it was handed over")
        inside, start = set(call.indices), call.indices[0]
        later = [k for k in handed.users.get(var, ()) if k >= start or k < 0]
        if not inside.issuperset(later):
            raise Unclear(
                "the value is used after the call too: whether the function returned "
                "it is not told"
            )
        Routes(handed, run, depth, function, var).refuse(name)
        return var

    # What is made of it ---------------------------------------------------------

    def _named(self, jaxpr: Any, eqns: list[Any], namings: list[_Naming]) -> Any:
        """Return a jaxpr in which the functions read names of what they are handed."""
        # A function inside another one reads the name of what the outer one was handed.
        order = sorted(namings, key=lambda n: (n.start, not n.own, -len(n.indices)))
        new: list[Any] = []
        names: dict[int, Any] = {}

        def read(index: int, until: int | None = None) -> dict[Any, Any]:
            return {
                n.var: names[k]
                for k, n in enumerate(order[:until])
                if k in names and index in n.indices
            }

        for index, eqn in enumerate(eqns):
            for k, asked in enumerate(order):
                if asked.start == index:
                    var = read(index, k).get(asked.var, asked.var)
                    new.append(naming(var, asked.name, eqn))
                    names[k] = new[-1].outvars[0]
                    pairs = [(t, str(asked.name)) for t in asked.targets]
                    self.named[names[k]] = pairs
            new.append(reading(eqn, read(index)))
        whole = {n.var: names[k] for k, n in enumerate(order) if n.own}
        results = [
            v if isinstance(v, _jax.Literal) else whole.get(v, v) for v in jaxpr.outvars
        ]
        return with_eqns(jaxpr, new, results)
