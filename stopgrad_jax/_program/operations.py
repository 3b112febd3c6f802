"""Which equations an operation is: by the names that JAX and the source have for it.

Many a function (`softmax`, `gelu`) is not one equation: JAX runs its Python and keeps
what that does. The stack of each equation still names the functions that were running,
so the equations of one call are found, and are the operation together.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Op
from stopgrad_jax._source.calls import Call, Calls
from stopgrad_jax._source.variables import users_of


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The equations of one call of a function, as one operation.

    Attributes:
      target: the position of the address that means it.
      name: the function's name.
      eqns: its equations, in program order; `indices` where they are.
      reads: the variables that it takes from outside, in the order of reading.
      writes: those of its results that are used outside; the last ones if none is.
      scope: the path of named scopes that all of it lies in.
      callers: the functions that were running when it was called.
      level: how many they were.
      unclear: why it cannot be told which equations these are, and at which line.
    """

    target: int
    name: str
    eqns: Sequence[Any]
    indices: Sequence[int]
    reads: Sequence[Any]
    writes: Sequence[Any]
    scope: str
    callers: frozenset[str]
    level: int
    unclear: str = ""

    @property
    def last(self) -> Any:
        """The equation that makes the last of the results."""
        return next(e for e in self.eqns[::-1] if self.writes[-1] in e.outvars)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What is left of calls at one place whose derivative has been taken."""

    target: int
    line: str
    scope: str
    callers: frozenset[str]


class Operations:
    """Finds operations by name."""

    def __init__(self, ops: Sequence[tuple[int, Op]]) -> None:
        self._ops = ops
        self._functions = [(k, names) for k, op in ops if (names := _names(op))]
        self._groups: dict[int, tuple[Any, list[Group], list[Taken]]] = {}

    def named(self, eqn: Any) -> Iterator[tuple[int, str]]:
        """Yield (target, name) for the addresses whose operation an equation is."""
        mine = {eqn.primitive.name, _jax.call_name(eqn)} - {None}
        for target, op in self._ops:
            for name in op.names:
                if mine & _exact(name) or any(_public(m) in _loose(name) for m in mine):
                    yield target, name
                    break

    def groups(self, jaxpr: Any) -> tuple[list[Group], list[Taken]]:
        """Return the calls of Python functions that are operations in a jaxpr.

        And what is left of those whose derivative has been taken.
        """
        if id(jaxpr) not in self._groups:
            taken: list[Taken] = []
            found = list(self._found(jaxpr, taken)) if self._functions else []
            self._groups[id(jaxpr)] = jaxpr, found, taken
        return self._groups[id(jaxpr)][1:]

    def _found(self, jaxpr: Any, taken: list[Taken]) -> Iterator[Group]:
        """Yield the calls of functions; what is left of others goes to `taken`."""
        calls, users = Calls(jaxpr.eqns), users_of(jaxpr, backward=True)
        gone: dict[Any, list[Any]] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            stack = _jax.stack_of(eqn)
            calls.step()
            for target, name, level in self._running(stack):
                # What `jax.grad` leaves of a call are the operations of its derivative:
                # no function of the arrays that the call was handed.
                if _jax.is_derivative(stack[:level]):
                    gone.setdefault((target, name, stack[:level]), []).append(eqn)
                else:
                    calls.add((target, name), index, eqn, stack, level)
        for (target, name, around), eqns in gone.items():
            if not self._is_equation(target, name, eqns):
                scope, line = _jax.scope_of(eqns[0]), _jax.line_of(eqns[0])
                taken.append(Taken(target, line, scope, _around(around)))
        for (target, name), found in calls.found.items():
            for call in found:
                if not self._is_equation(target, name, call.eqns):
                    yield self._group(target, name, call, users)

    def _is_equation(self, target: int, name: str, eqns: Iterable[Any]) -> bool:
        """Tell a call that one of its equations is by itself."""
        named = (pair for eqn in eqns for pair in self.named(eqn))
        return any((t, _public(n)) == (target, _public(name)) for t, n in named)

    def _running(self, stack: Sequence[Any]) -> Iterator[tuple[int, str, int]]:
        """Yield (target, name, level) of the outermost function that is meant."""
        for target, names in self._functions:
            # From outside, since what lies inside a match is not matched again.
            for level, (code, _) in enumerate(stack):
                name = next((n for n in source_names(code) if n in names), None)
                if name is not None:
                    yield target, name, level
                    break

    def _group(
        self, target: int, name: str, call: Call, users: dict[Any, list[int]]
    ) -> Group:
        """Return a call as one operation, with what it reads and hands on."""
        first, last = call.indices[0], call.indices[-1]
        unclear, line = "", _jax.line_of(call.eqns[0])
        if call.is_unclear:
            unclear = f"loops run around it and inside it ({line})"
        elif len(call.indices) != last - first + 1:
            unclear = f"others lie between its operations ({line})"
        made = {v for eqn in call.eqns for v in eqn.outvars}
        atoms = (v for eqn in call.eqns for v in eqn.invars)
        outer = (v for v in atoms if not isinstance(v, _jax.Literal) and v not in made)
        inside = set(call.indices)
        writes = [v for v in made if not inside.issuperset(users.get(v, ()))]
        order = {v: k for k, eqn in enumerate(call.eqns) for v in eqn.outvars}
        return Group(
            target,
            name,
            call.eqns,
            call.indices,
            list(dict.fromkeys(outer)),
            sorted(writes or call.eqns[-1].outvars, key=order.__getitem__),
            _common([_jax.scope_of(eqn) for eqn in call.eqns]),
            _around(_jax.stack_of(call.eqns[0])[: call.level]),
            call.level,
            unclear,
        )


def _common(paths: Sequence[str]) -> str:
    levels = zip(*(path.split("/") for path in paths), strict=False)
    same = []
    for level in levels:
        if len(set(level)) > 1:
            break
        same.append(level[0])
    return "/".join(same)


def _around(stack: Iterable[tuple[types.CodeType, int]]) -> frozenset[str]:
    return frozenset(name for code, _ in stack for name in callers(code))


# Names ----------------------------------------------------------------------------


def _public(name: str) -> str:
    return name.lstrip("_") or name


@functools.cache
def _exact(name: str) -> frozenset[str]:
    """What JAX calls it: the name itself, and what a function of JAX becomes."""
    return frozenset({name}) | (set() if _jax.is_primitive(name) else becomes(name))


@functools.cache
def _loose(name: str) -> frozenset[str]:
    # The name of a primitive means it alone, and no function that is called the same.
    return frozenset() if _jax.is_primitive(name) else frozenset({name, _public(name)})


def _names(op: Op) -> frozenset[str]:
    """The names of Python functions that an address means."""
    return frozenset().union(*(_loose(name) for name in op.names))


@functools.cache
def source_names(code: types.CodeType) -> tuple[str, ...]:
    """Return what the source calls a function: a module's call by its class.

    Of JAX's own functions those count that users call; the others have any names.
    """
    names = callers(code)
    if _jax.is_own(code.co_filename):
        own = bool(names) and is_public(names[0]) and code.co_name != "__call__"
        return names[:1] if own else ()
    return tuple(dict.fromkeys((*names, *map(_public, names[:1]))))


@functools.cache
def callers(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of a function that calls: its own, and with its class."""
    if code.co_name.startswith("<") or code.co_filename.startswith(_HERE):
        return ()
    parts = [p for p in code.co_qualname.split(".") if p != "<locals>"]
    *around, own = parts
    name = around[-1] if own == "__call__" and around else own
    return tuple(dict.fromkeys((name, ".".join(parts[-2:]), code.co_qualname)))


def is_public(name: str) -> bool:
    """Tell whether JAX has a public function of this name for arrays."""
    return name in _public_names() and not name.startswith("_")


@functools.cache
def _public_names() -> frozenset[str]:
    modules = jax.nn, jnp, jax.lax, jax.random, jnp.linalg, jax.scipy.special
    return frozenset().union(*map(dir, modules))


def shorter(name: str) -> list[str]:
    """Return a dotted name with less and less in front: `nn.gelu` and `gelu`."""
    parts = name.split(".")
    rests = (".".join(parts[k:]) for k in range(1, len(parts)))
    return [rest for rest in rests if rest]


def is_another(name: str) -> bool:
    """Tell a name with a module in front that is not the primitive of that name."""
    *modules, own = name.split(".")
    return bool(modules) and own in _jax.NOT_PRIMITIVES and "lax" not in modules


def code_in_jax(name: str) -> types.CodeType | None:
    """Return the code of a function of JAX by its module and name, `jnp.max`."""
    first, *rest = name.removeprefix("jax.").split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may be deprecated
        is_numpy = first in ("jnp", "np", "numpy")
        found: Any = jnp if is_numpy else getattr(jax, first, None)
        for part in rest:
            found = getattr(found, part, None)
    return getattr(inspect.unwrap(found), "__code__", None) if found else None


_HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


@functools.cache
def becomes(name: str) -> frozenset[str]:
    """Return what a function of `jax.nn`, `jax.numpy` or `jax.lax` is in a program.

    `sigmoid` is the primitive `logistic` and `swish` a jitted `silu`: JAX is asked, for
    one, two and three vectors. Nothing for a function that is several equations.
    """
    found = set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (jax.nn, jnp, jax.lax):
            function = getattr(module, name, None) if name.isidentifier() else None
            pure = isinstance(getattr(np, name, None), np.ufunc)
            if function is None or not (pure or hasattr(function, "lower")):
                continue  # what runs Python is in the stacks
            for count in (1, 2, 3):
                args = [jax.ShapeDtypeStruct((2,), jnp.float32)] * count
                try:
                    jaxpr, _ = _jax.opened(jax.make_jaxpr(function)(*args))
                except Exception:  # so many arguments it does not take
                    continue
                if len(jaxpr.eqns) == 1:
                    (eqn,) = jaxpr.eqns
                    found.add(_jax.call_name(eqn) or eqn.primitive.name)
                break
    return frozenset(found)
