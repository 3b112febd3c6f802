"""What an argument of a public function must be, and how one is printed."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from ._address import leaf_paths
from ._errors import function_name, type_of, wrong

UNBOUNDED = 2**31 - 1


def require_function(fun: Any, verb: str, what: str = "fun") -> None:
    """Refuse what is no function that JAX can trace: most often a value of one."""
    called = f"{verb}({shown(fun)}, ...)"
    if not callable(fun):
        name = {"forward": "jnp.round", "fun": "loss"}.get(what, what)
        write = f"sg.{verb}({name}, ...)(w, x): the function, and its arguments after"
        came = "nothing" if fun is None else f"{shown(fun)}, a value"
        raise wrong(TypeError, called, f"{what} is a function", came, write)
    kinds = {
        "an async function": inspect.iscoroutinefunction,
        "an async generator": inspect.isasyncgenfunction,
        "a generator": inspect.isgeneratorfunction,
    }
    for kind, is_kind in kinds.items():
        if is_kind(fun):
            raise wrong(
                TypeError,
                called,
                f"{what} is a function that returns arrays",
                f"{function_name(fun)}, {kind}",
                "a plain def that returns them",
            )


def shown(x: Any, most: int = 60) -> str:
    """Print what was handed in on one line; of an array, its type."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return type_of(x)
    if callable(x) and not isinstance(x, type):
        return function_name(x)
    if type(x) in (list, tuple, dict) and x:
        if isinstance(x, dict):
            inner = [f"{k!r}: {shown(v, most)}" for k, v in x.items()]
        else:
            inner = [shown(v, most) for v in cast(Iterable[Any], x)]
        left, right = {list: "[]", tuple: "()", dict: "{}"}[type(x)]
        text = f"{left}{', '.join(inner)}{right}"
    else:
        text = " ".join(repr(x).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def require_arrays(tree: Any, called: str, what: str, instead: str = "") -> None:
    """Refuse leaves that a compiled program cannot take: most often a string."""
    leaves = jax.tree.leaves(tree)
    first = next((k for k, x in enumerate(leaves) if not _is_array(x)), None)
    if first is None:
        return
    path = leaf_paths(tree)[first]
    came = f"{leaves[first]!r:.40} ({type(leaves[first]).__name__})"
    raise wrong(
        TypeError,
        called,
        f"a {what}, which the compiled program is given",
        came + (f' at "{path}"' if path else ""),
        instead
        or "a batch without it: what does not change is bound before, as by "
        "make_step(functools.partial(loss, ...), ...)",
    )


def _is_array(x: Any) -> bool:
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct) or hasattr(x, "__jax_array__"):
        return True
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def require_call(fun: Callable[..., Any], args: tuple[Any, ...], called: str) -> None:
    """Refuse a function of another number of arguments than it will be given."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):  # a builtin that cannot be asked
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise wrong(
            TypeError,
            called,
            f"a function of {len(args)} arguments",
            f"{function_name(fun)}{signature}: {error}",
            f"lambda {', '.join(map(str, args))}: ...",
        ) from None


def require_same_tree(
    new: Any,
    old: Any,
    called: str,
    expected: str = "the function returns a tree like its argument",
    instead: str = "jax.tree.map(function_of_a_leaf, tree)",
    kind: type[Exception] = TypeError,
) -> None:
    """Refuse a tree of another structure; most often what a user's function made."""
    structure, came = jax.tree.structure(old), jax.tree.structure(new)
    if came != structure:
        raise wrong(kind, called, f"{expected}, {structure}", str(came), instead)


# Numbers and arrays -------------------------------------------------------------------


def is_known(value: Any) -> bool:
    """Tell whether a number or array has a value now, to be checked."""
    numbers = bool | int | float | np.ndarray | np.generic | jax.Array
    return isinstance(value, numbers) and not _jax.is_traced(value)


def whole(
    value: Any,
    name: str,
    called: str,
    least: int = 1,
    most: int = UNBOUNDED,
    instead: str = "",
) -> int:
    """Return a Python int between two bounds, or refuse it."""
    is_int = not isinstance(value, bool) and not _jax.is_traced(value)
    try:  # of an array that holds one, too
        number = operator.index(value) if is_int else 0
    except TypeError:
        number, is_int = 0, False
    if is_int and least <= number <= most:
        return number
    expected = f"{name} is an int, at least {least}"
    if most != UNBOUNDED:
        expected = f"{name} is an int from {least} to {most}"
    if isinstance(value, float) and value.is_integer() and least <= value <= most:
        instead = f"{name}={int(value)}"
    elif not instead:
        instead = f"{name}={least if most == UNBOUNDED else min(max(least, 8), most)}"
    kind = ValueError if is_int else TypeError
    raise wrong(kind, called, expected, f"{name}={value!r:.60}", instead)


def option(
    value: Any, name: str, options: Sequence[Any], called: str, instead: str = ""
) -> None:
    """Refuse a word that is none of an argument's."""
    if (value is None or isinstance(value, str)) and value in options:
        return
    words = [f'"{x}"' if isinstance(x, str) else repr(x) for x in options]
    expected = f"{name} is {', '.join(words[:-1])} or {words[-1]}"
    instead = instead or f"{name}={words[-1]}"
    raise wrong(ValueError, called, expected, f"{name}={value!r:.60}", instead)


def real_number(value: Any, name: str, called: str) -> jax.Array:
    """Return a real number, or an array of them, as an array, or refuse it."""
    try:
        array = jnp.asarray(value)
        came = type_of(array)
        kinds = (jnp.integer, jnp.floating)
        is_real = any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
    except (TypeError, ValueError):  # the latter for None
        array, came, is_real = jnp.zeros(()), repr(value)[:60], False
    if not is_real:
        raise wrong(TypeError, called, f"{name} is a real number", came, f"{name}=1.0")
    return array


def real_floats(x: Any, name: str, called: str) -> jax.Array:
    """Return an array of real floats, or refuse it."""
    try:
        array = jnp.asarray(x)
        came, is_real = type_of(array), jnp.issubdtype(array.dtype, jnp.floating)
    except (TypeError, ValueError):  # the latter for None
        array, came, is_real = jnp.zeros(()), type(x).__name__, False
    if not is_real:
        instead = "the call on the float value, before it is rounded or cast"
        if jnp.issubdtype(array.dtype, jnp.integer):
            instead = f"{name}.astype(jnp.float32)"
        if jnp.iscomplexobj(array):
            instead = f"{name}.real, or {name}.imag"
        expected = f"{name} is an array of real floats"
        raise wrong(TypeError, called, expected, came, instead)
    return array


def require_broadcast(
    array: jax.Array, name: str, x: jax.Array, called: str, to: str, instead: str
) -> None:
    """Refuse a parameter that is not one for each entry of an array, or of a part."""
    try:
        fits = jnp.broadcast_shapes(array.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        expected = f"{name} broadcasts to {to}, {type_of(x)}"
        raise wrong(ValueError, called, expected, type_of(array), instead)
