"""Why an address matches nothing: said with what there is, and what to write.

What an error says to write has been tried: it selects something in this program.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import (
    RETURN,
    Address,
    Op,
    Point,
    Var,
    has_wildcard,
    matches_scope,
    nearest,
    nodes,
    prefixes,
)
from stopgrad_jax._errors import AddressError, folded, quoted, type_of, wrong
from stopgrad_jax._source.labels import Labels

from . import nth
from .operations import code_in_jax, is_another, is_public, shorter, source_names
from .search import Search
from .trace import Place, Static, Traced
from .unfound import Looked, as_code, every_eqn

Reply = tuple[str, str]  # what came, and what to write instead


def reads_back(value: Any, most: int = 40) -> bool:
    """Tell what Python reads back as it prints it, and that is short: no array is."""
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value if len(text) <= most else False
    except (ValueError, SyntaxError):
        return False
    return same is True


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """What was seen while addresses were looked for.

    `working` returns those of some addresses that select something here (`wanted`: that
    the call takes), `look` what is seen when a variable is looked for.
    """

    traced: Traced
    targets: Sequence[Any]
    search: Search
    variables: Looked | None
    working: Callable[..., list[Any]]
    look: Callable[[Var], Looked]
    kinds: Sequence[str] = ("argument", "output", "point")  # of places that are taken

    def suggesting(self, wanted: Any) -> Unmatched:
        """Return this for a call that takes only what is `wanted`."""
        # Whatever tries addresses for an error is to try them as this call takes them.
        working = functools.partial(self.working, wanted=wanted)

        def looked(told: Looked) -> Looked:
            return dataclasses.replace(told, working=working)

        variables = self.variables and looked(self.variables)

        def look(var: Var) -> Looked:
            return looked(self.look(var))

        return dataclasses.replace(
            self,
            variables=variables,
            working=working,
            look=look,
            kinds=[kind for kind in self.kinds if kind in wanted.kinds],
        )

    def no_match(self, address: Address, asked: str) -> AddressError:
        """Return the error for an address that selects nothing."""
        asked = f"{asked}: address {as_code(address)}"
        if isinstance(address, Var) and self.variables is not None:
            return self.variables.no_variable(address, asked)
        if address in ("", Point("")):
            arguments, names = map(quoted, (self.traced.arguments, self.search.names))
            write = self._any(points=isinstance(address, Point))
            came = f'""; arguments {arguments}, points {names}'
            return wrong(AddressError, asked, "an address is not empty", came, write)
        if isinstance(address, Op):
            kinds = "a function, or a primitive, of"
            came, write = self._operation(address)
        else:
            taken = ("point",) if isinstance(address, Point) else self.kinds
            *first, last = (_KINDS[kind] for kind in taken)
            kinds = f"{', '.join(first)} or {last} of" if first else f"{last} of"
            came, write = self._value(address)
        expected = f"it must match {kinds} {self.traced.name}"
        return wrong(AddressError, asked, expected, folded(came), folded(write))

    # Arguments, outputs and points ----------------------------------------------

    def _value(self, address: Address) -> Reply:
        arguments = self.traced.arguments
        # A name in a program that cannot be rewritten is there, and is no remedy.
        names = [n for n in self.search.names if n not in self.search.buried]
        if isinstance(address, str):
            kinds = (self._below, self._unpassed, self._variable, self._called)
            for told in (*kinds, self._scope):
                found = told(address)
                if found is not None:
                    return found
        came = f"arguments {quoted(arguments)}, points {quoted(self.search.names)}"
        for primitive, line in self.search.opaque.items():
            came += f'; "{primitive}" at {line} holds a program that cannot be searched'
        if isinstance(address, Point):
            near = self.working(map(Point, nearest(address.name, names)))
            near = near or self.working(map(Point, names))
            new = "h" if has_wildcard(address.name) else address.name
            write = _one_of(near) if near else f'sg.name(value, "{new}")'
            return came, write
        known, text = [*self._edges, *names], str(address)
        labels = self.look(Var(text)).labels if isinstance(address, str) else []
        ends = [path for path in known if path.endswith(f"/{text}")]
        ends += [label for label in labels if label.endswith(f".{text}")]
        near = [*ends[:3], *nearest(text, [*known, *labels])][:3]
        whole = {path for path in known for path in prefixes(path)}
        works = self.working([self._clear(n) if n in whole else Var(n) for n in near])
        return came, _one_of(works, near=True) if works else self._any()

    @functools.cached_property
    def _edges(self) -> dict[str, Any]:
        """Arguments and outputs below each path: by position where there is no name."""
        arguments = self.traced.arguments
        named = {id(x) for tree in arguments.values() for _, x in nodes(tree)}
        roots = {
            str(k): tree
            for k, tree in enumerate(self.traced.positional)
            if id(tree) not in named
        }
        roots = {**arguments, **roots, RETURN: self.traced.output}
        return {
            path: x for root, tree in roots.items() for path, x in nodes(tree, root)
        }

    def _below(self, text: str) -> Reply | None:
        """`"b/0"`, where b is an array."""
        by_position = (
            pair
            for k, tree in enumerate(self.traced.positional)
            for pair in nodes(tree, str(k))
        )
        names = {id(x): path for path, x in self._edges.items()}
        places = dict(by_position) | self._edges
        # The longest first; the path itself is what matched nothing.
        for path in list(prefixes(text))[-2::-1]:
            place = places.get(path)
            path = names.get(id(place), path)
            if isinstance(place, Place):
                edges = self.traced.jaxpr.invars, self.traced.jaxpr.outvars
                var = edges[place.kind == "output"][place.index]
                kind = f"one array, {type_of(var.aval)}"
            elif isinstance(place, Static):
                kind = f"a Python value, {place.value!r:.40}, which is not traced"
            elif place is None and path in self.search.names:
                kind = "a point of one array"
            elif place is None:
                continue
            else:
                return None
            write = self.working([self._clear(path)])
            came = f'"{path}" is {kind}: nothing below it has an address'
            return came, _one_of(write) if write else self._any()
        return None

    def _any(self, points: bool = False) -> str:
        """Say all that an address of a value, or only of a point, can be here."""
        names = [n for n in self.search.names if n not in self.search.buried]
        paths = map(self._clear, [*self.traced.arguments, *names, RETURN])
        works = self.working(map(Point, names) if points else paths)
        if points and not works:
            return 'sg.name(value, "h"), for there to be a point'
        return _one_of(works, near=True) if works else "another address"

    def _clear(self, path: str) -> Address:
        """Address an argument by position where a point has its name, too."""
        place = self.traced.by_position(path) if path in self.search.names else None
        return path if place is None else place

    def _unpassed(self, text: str) -> Reply | None:
        """A default that was not passed, or what a partial has bound."""
        name = text.split("/")[0]
        if name in self.traced.arguments:
            return None
        parameter = _parameters(self.traced.fun).get(name)
        fun, own = self.traced.name, self.traced.fun
        if parameter is not None and parameter.default is not parameter.empty:
            known = reads_back(parameter.default)
            default = f"{name}={parameter.default!r}" if known else f"pass {name}"
            came = f'"{name}" is a parameter of {fun} that was not passed'
            return came, f"{default} in the call: what is passed can be addressed"
        while isinstance(own, functools.partial):
            own = own.func
            if name in _parameters(own):
                came = f'"{name}" is a parameter that functools.partial has filled'
                return came, f"a function that is passed {name} in the call"
        return None

    def _variable(self, text: str) -> Reply | None:
        """A local variable of the source: one or, by `nth`, several statements."""
        if not re.fullmatch(r"[^\W\d][\w.]*", text):
            return None
        told = self.look(Var(text)).told(0, Var(text))
        came = f'no point: "{text}" is a variable of the source'
        return (came, _one_of(told)) if told else None

    def _called(self, text: str) -> Reply | None:
        """A function or a primitive."""
        names = [text]
        # `x.mean` of an argument `x` is its method, and no function of a module `x`.
        if text.split(".")[0] not in self.traced.arguments:
            names += self._without_modules(text)
        works = self.working(map(Op, names))[:1]
        if not works:
            return None
        came = f'no point: "{works[0].name}" is an operation'
        return came, _one_of(works)

    def _scope(self, text: str) -> Reply | None:
        """A named scope: a module of flax or haiku."""
        inside = [(eqn, path) for eqn, path in self._eqns if matches_scope(text, path)]
        if not inside:
            return None
        candidates = [Op(name, text) for name in _callers([eqn for eqn, _ in inside])]
        candidates.append(Op(inside[-1][0].primitive.name, text))
        write = self.working(candidates)[:1]
        below = [p for p in self._edges if p.endswith("/" + text)]
        below = [p for p in below if not p.startswith(RETURN + "/")]
        write += self.working(below)[:1]
        came = f'"{text}" is a named scope, in "{inside[0][1]}"'
        return (came, _one_of(write)) if write else None

    @functools.cached_property
    def _eqns(self) -> list[tuple[Any, str]]:
        """Every equation, in nested programs too, and the path of scopes around it."""
        return list(every_eqn(self.traced.jaxpr, ""))

    # Operations -----------------------------------------------------------------

    def _operation(self, op: Op) -> Reply:
        search, number = self.search, self.targets.index(op)
        if number in search.hidden:
            return self._in_rules(search.hidden[number])
        if number in search.taken:
            line = search.taken[number]
            came = f"calls whose derivative has been taken already only ({line})"
            return came, nth.INNER
        if number in search.outside:
            return self._outside(op, list(search.outside[number]))
        operations = [name for name in search.ops if name not in _jax.NAMED]
        came = f"functions {quoted(self._functions)}, operations {quoted(operations)}"
        same = self._same(op)
        if same:
            return came, _one_of(same)
        known = [*self._functions, *operations]
        names = [name.rpartition(".")[2] or name for name in op.names]
        # What JAX has is spelled right, and something else is not what was meant.
        odd = [name for name in names if not is_public(name)]
        every = dict.fromkeys(
            [*known, *(source_names(code)[0] for code in self._codes)]
        )
        near = [n for name in names for n in every if name.lower() in n.lower()]
        near += [n for name in odd for n in nearest(name, known, cutoff=0.6)]
        others = {name.rpartition(".")[2] for name in op.names if is_another(name)}
        near = [n for n in near if n not in others]
        works = self.working(dataclasses.replace(op, name=n) for n in near)
        rest = (n for n in [*self._inside, *operations] if n not in others)
        works = works or self.working(map(Op, rest))
        guessed = (*names,) != op.names
        return came, _one_of(works[:3], guessed) if works else "another function"

    def _in_rules(self, rules: Mapping[tuple[str, ...], str]) -> Reply:
        """Matches that only custom rules hold: their names, and a line of each."""
        lines = ", ".join(dict.fromkeys(line for line in rules.values() if line))
        came = "matches in the body of a custom rule only, where it is not looked for"
        came += f" ({lines})" if lines else ""
        works = self.working(Op(name) for names in rules for name in names)
        mine = ([a for a in map(Op, names) if a in works][:1] for names in rules)
        write = list(dict.fromkeys(address for each in mine for address in each))
        return came, _one_of(write) if write else _OF_THE_RULE

    def _same(self, op: Op) -> list[Any]:
        """Return the address without modules in front: sg.op("jax.nn.gelu")."""
        found = list[str]()
        for name in op.names:
            short = self.working(map(Op, self._without_modules(name)))[:1]
            found += [n for one in short for n in one.names]
        if not found:
            return []
        names = tuple(dict.fromkeys(found))
        short = dataclasses.replace(op, name=names if names[1:] else names[0])
        wider = dataclasses.replace(short, nth=None)
        return self.working([short, wider, Op(short.name)])[:1]

    def _without_modules(self, name: str) -> list[str]:
        """Return what a function may be called here that has modules in front."""
        if not is_another(name):
            return shorter(name)
        # It is called what it becomes here, if that is one operation: `reduce_max`.
        code, made = code_in_jax(name), dict[str, None]()
        for eqn, _ in self._eqns if code else ():
            if any(each is code for each, _ in _jax.stack_of(eqn)):
                made[_jax.call_name(eqn) or eqn.primitive.name] = None
        return [*made] if len(made) == 1 else []

    def _outside(self, op: Op, around: Sequence[str]) -> Reply:
        """A name that matches, and a `within` that does not."""
        assert op.within is not None
        levels = [level for path in around for level in path.split("/")]
        known = list(dict.fromkeys([*around, *levels, *self._inside]))
        bare = shorter(op.within)
        near = dict.fromkeys([*bare, *nearest(op.within, known), *known])
        candidates = [dataclasses.replace(op, within=n) for n in [*near][:16]]
        works = self.working([*candidates, dataclasses.replace(op, within=None)])
        where = f"in {quoted(around)}" if around else "in no named scope"
        came = f'none within "{op.within}": there are matches {where}'
        return came, _one_of(works[:3]) if works else "another function"

    @functools.cached_property
    def _codes(self) -> list[types.CodeType]:
        """Every function that ran while an equation was made and can be addressed."""
        stacks = (_jax.stack_of(eqn) for eqn, _ in self._eqns)
        codes = dict.fromkeys(code for stack in stacks for code, _ in stack)
        return [code for code in codes if source_names(code)]

    @functools.cached_property
    def _functions(self) -> list[str]:
        """Functions as the source calls them: the user's, modules, and JAX's public."""
        labels = Labels()
        told = (source_names(code)[0] for code in self._codes if _is_told(code, labels))
        return list(dict.fromkeys(told))

    @property
    def _inside(self) -> list[str]:
        """The same but for the traced function, which all of it is in."""
        return [name for name in self._functions if name != self.traced.name]


def _callers(eqns: Sequence[Any]) -> list[str]:
    """Return the modules whose call made all of some equations, the inner first."""
    every = [
        {c: None for c, _ in _jax.stack_of(eqn) if c.co_name == "__call__"}
        for eqn in eqns
    ]
    codes = [c for c in every[0] if all(c in each for each in every)]
    return [
        source_names(c)[0] for c in reversed(codes) if not _jax.is_own(c.co_filename)
    ]


_KINDS = {"argument": "an argument", "output": "an output", "point": "a named point"}
_OF_THE_RULE = "sg.op of the function that has the rule"


def _is_told(code: types.CodeType, labels: Labels) -> bool:
    if _jax.is_own(code.co_filename):
        return True
    return code.co_name == "__call__" or labels.is_users(code.co_filename)


def _parameters(fun: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        return {}


def _one_of(addresses: Iterable[Any], near: bool = False) -> str:
    """List addresses; a string that starts with "sg." is one as it is written.

    `near`: they are guesses, and one is not the only one.
    """
    shown = [
        a if isinstance(a, str) and a.startswith("sg.") else as_code(a)
        for a in addresses
    ]
    one = len(shown) == 1 and not near
    return shown[0] if one else "one of " + ", ".join(shown[:8])
