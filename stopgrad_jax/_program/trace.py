"""A function and example arguments -> a jaxpr that knows the user's names."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
import stopgrad_jax._jax.errors as _jax_errors
from stopgrad_jax._address import nodes
from stopgrad_jax._errors import function_name, has_beats, type_of, wrong
from stopgrad_jax._source.as_written import anew, as_written
from stopgrad_jax._source.watched import Seen, watching
from stopgrad_jax._trees import Split


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """One array-valued place of a traced function, by number."""

    kind: str  # "argument", "output" or "point" (a value found inside)
    index: int


@dataclasses.dataclass(frozen=True)
class Static:
    """A leaf that is not traced: it stays the Python value it is."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function traced at its arguments.

    `arguments` maps each parameter's name to its argument with every leaf replaced
    by a `Place` or a `Static`; `positional` holds the positional ones in order, and
    `output` is the result in the same way. `call` is what it was called with, and
    `run(*leaves)` calls it anew with other leaves and returns the arrays of its result.
    """

    name: str
    jaxpr: Any
    consts: Sequence[Any]
    leaves: list[Any]
    arguments: Mapping[str, Any]
    positional: Sequence[Any]
    output: Any
    fun: Callable[..., Any]
    call: tuple[tuple[Any, ...], dict[str, Any]]
    run: Callable[..., list[Any]]

    def watched(self, names: frozenset[str]) -> tuple[Traced, Sequence[Seen]]:
        """Trace anew and see what variables are given; nothing if it cannot be."""
        try:
            with watching(names) as watch:
                return self.again(), watch.seen
        except Exception:  # it cannot be called twice
            return self, ()

    def again(self) -> Traced:
        """Trace anew: what was asked of this trace's rules may have left its marks."""
        return trace(self.fun, *self.call)

    @property
    def roots(self) -> dict[str, Any]:
        """Trees of places of the arguments, by name and by position."""
        by_position = {str(k): tree for k, tree in enumerate(self.positional)}
        return dict(self.arguments) | by_position

    @property
    def named(self) -> dict[str, Any]:
        """The same with each once: by name where it has one."""
        seen = {id(leaf) for leaf in jax.tree.leaves(dict(self.arguments))}
        positions = enumerate(self.positional)
        return dict(self.arguments) | {
            str(k): tree
            for k, tree in positions
            if not all(id(leaf) in seen for leaf in jax.tree.leaves(tree))
        }

    def by_position(self, path: str) -> int | str | None:
        """Address what lies at a path of an argument by position, if it has one."""
        name, _, rest = path.partition("/")
        own = self.arguments.get(name)
        found = [k for k, tree in enumerate(self.positional) if tree is own]
        if len(found) != 1:
            return None
        return f"{found[0]}/{rest}" if rest else found[0]

    def paths(self) -> dict[int, str]:
        """Address of each argument place, by number: by name where it has one."""
        return {
            place.index: path
            for root, tree in self.named.items()
            for path, place in nodes(tree, root)
            if isinstance(place, Place)
        }


def is_traceable(leaf: Any) -> bool:
    """Arrays and Python floats are traced; every other leaf stays as it is."""
    # Strings and objects are no arrays of JAX. bfloat16 and its like are, and NumPy has
    # no kind for them but that of raw bytes.
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufc" or _is_extension_float(leaf.dtype)
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | float | complex)


def _is_extension_float(dtype: np.dtype) -> bool:
    return dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.number)


def trace(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict) -> Traced:
    """Trace `fun` as `jax.jit` does, anew at every call."""
    call = args, kwargs
    flat, tree = jax.tree.flatten(call)
    static = _static(fun, args, kwargs)
    pairs = zip(flat, static, strict=True)
    dynamic = Split([is_traceable(x) and not is_static for x, is_static in pairs])
    leaves = list(map(_as_array, dynamic.chosen(flat)))
    result: list[Any] = []

    # A fresh function each time: JAX caches jaxprs by function object, and an old
    # one would hold the old values of closed-over arrays and globals.
    def run(*traced: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(tree, dynamic.joined(traced, flat))
        out, out_tree = jax.tree.flatten(_called(fun, args, kwargs))
        arrays = Split(list(map(is_traceable, out)))
        places = _places("output", arrays, out)
        result.append(jax.tree.unflatten(out_tree, places))
        return arrays.chosen(out)

    try:
        with as_written():
            closed = _own(lambda: jax.make_jaxpr(run)(*leaves))
    except ValueError as error:
        if _jax_errors.is_traced_static(error):
            _refuse_static(fun, args, kwargs)
        raise
    args, kwargs = jax.tree.unflatten(tree, _places("argument", dynamic, flat))
    return Traced(
        function_name(fun),
        closed.jaxpr,
        closed.consts,
        leaves,
        _bind(fun, args, kwargs),
        args,
        result[-1],
        fun,
        call,
        run,
    )


def _places(kind: str, traced: Split, leaves: Sequence[Any]) -> list[Any]:
    """Stand for leaves: those that are traced by number, all else as it is."""
    numbered = (Place(kind, k) for k in itertools.count())
    return traced.joined(numbered, map(Static, leaves))


def _own(traced: Callable[[], Any]) -> Any:
    """Trace a program that shares no rule with JAX's own cache.

    A rule that is told which operands move is left in another state by each question,
    for the user's `jax.grad`, too.
    """
    closed = traced()
    rules = list(_rules_in(closed.jaxpr))
    # What is nested may be in JAX's cache, and then it is not ours alone.
    if any(is_nested for is_nested, _ in rules):
        with anew():
            closed = traced()
        rules = list(_rules_in(closed.jaxpr))
    for _, eqn in rules:
        _jax.forget(eqn)
    return closed


def _rules_in(jaxpr: Any, is_nested: bool = False) -> Iterator[tuple[bool, Any]]:
    for eqn in jaxpr.eqns:
        if _jax.remembers(eqn):
            yield is_nested, eqn
        for inner in _jax.inner_jaxprs(eqn):
            yield from _rules_in(_jax.opened(inner)[0], True)


def _static(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict) -> list[bool]:
    """Tell of each leaf whether a jitted function itself declares it static."""
    by_position, by_name = _jax.static_arguments(fun, args, kwargs)
    pairs = [*zip(by_position, args, strict=True)]
    pairs += [(by_name[name], kwargs[name]) for name in sorted(kwargs)]
    return [is_static for is_static, x in pairs for _ in jax.tree.leaves(x)]


def _called(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict) -> Any:
    try:
        return fun(*args, **kwargs)
    except TypeError as error:
        # Raised by the call itself, and by nothing in the function?
        frames = error.__traceback__
        if frames is None or frames.tb_next is not None or has_beats(error):
            raise
        name = function_name(fun)
        got, signature = str(error), _signature(fun)
        came = f"{len(args)} positional arguments"
        came += f" and {', '.join(kwargs)} by keyword" if kwargs else ""
        call = f"{name}({', '.join(signature.parameters) if signature else '...'})"
        expected = "the arguments that it takes"
        # Raised behind the `except`, so that Python does not print its error above this
        # one.
        refused = wrong(TypeError, call, expected, f"{came}: {got}", call)
    raise refused


def _refuse_static(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict
) -> None:
    """Say how a float stays one that a jitted function inside declares static."""
    given = _bind(fun, args, kwargs)
    floats = [n for n, x in given.items() if _holds_float(x)]
    if not floats:
        return
    name, last = function_name(fun), [*given][len(args) - 1 :][:1]
    written, signature = name if name.isidentifier() else "fun", _signature(fun)
    kinds = [p.kind for p in signature.parameters.values()] if signature else []
    unnamed = inspect.Parameter.VAR_POSITIONAL in kinds

    def bound(fixed: str) -> str:
        value = repr(given[fixed])
        if fixed in kwargs or fixed in last:
            return f"functools.partial({written}, {fixed}={value})"
        rest = ", ".join(n for n in given if n != fixed)
        every = ", ".join(value if n == fixed else n for n in given)
        return f"lambda {rest}: {written}({every})"

    expected = "Python floats are traced, and a static argument of jax.jit may not be"
    came = "a traced float as a static argument of a jitted function inside"
    instead = " or ".join(map(bound, filter(lambda n: _is_plain(given[n]), floats)))
    if unnamed or not instead:
        instead = "functools.partial or a lambda, which bind the float"
    raise wrong(ValueError, name, expected, came, instead)


def _holds_float(x: Any) -> bool:
    return any(isinstance(leaf, float | complex) for leaf in jax.tree.leaves(x))


def _is_plain(x: Any) -> bool:
    """Tell a value that can be written down."""
    if isinstance(x, tuple):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | complex | str)


def _signature(fun: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fun)
    except (TypeError, ValueError):  # a builtin that cannot be asked
        return None


def require_known(values: Iterable[Any], called: str, name: str) -> None:
    """Refuse what is traced or only a shape, where a function is to be run."""
    for x in values:
        if _jax.is_traced(x) or isinstance(x, jax.ShapeDtypeStruct):
            traced = _jax.is_traced(x)
            raise wrong(
                TypeError,
                called,
                "arrays whose values are known: the function is run",
                f"a traced {type_of(x)}" if traced else f"only {type_of(x)}",
                f"the call outside of jax.jit: sg.{name}(jax.jit(fun))(*args)",
            )


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def _bind(fun: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """Name the arguments as `fun` does; only keywords where it cannot be asked."""
    signature = _signature(fun)
    try:
        return dict(signature.bind(*args, **kwargs).arguments if signature else kwargs)
    except TypeError:  # decorators with another signature
        return dict(kwargs)


def arrays_at(tree: Any, places: Mapping[str, Sequence[Any]]) -> Any:
    """Put arrays where a tree holds places: `places[value.kind][value.index]`."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Place):
            return places[leaf.kind][leaf.index]
        return leaf.value if isinstance(leaf, Static) else leaf

    return jax.tree.map(fill, tree)
