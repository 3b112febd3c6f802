"""What an argument of a public function must be, and how one is printed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax

from ._address import leaf_paths
from ._errors import beats, function_name, type_of


def require_function(fun: Any, verb: str, what: str = "fun") -> None:
    """Refuse what is no function that JAX can trace: most often a value of one."""
    called = f"{verb}({shown(fun)}, ...)"
    if not callable(fun):
        name = {"forward": "jnp.round", "fun": "loss"}.get(what, what)
        write = f"sg.{verb}({name}, ...)(w, x): the function, and its arguments after"
        came = "nothing" if fun is None else f"{shown(fun)}, a value"
        raise TypeError(beats(called, f"{what} is a function", came, write))
    kinds = {
        "an async function": inspect.iscoroutinefunction,
        "an async generator": inspect.isasyncgenfunction,
        "a generator": inspect.isgeneratorfunction,
    }
    for kind, is_kind in kinds.items():
        if is_kind(fun):
            raise TypeError(
                beats(
                    called,
                    f"{what} is a function that returns arrays",
                    f"{function_name(fun)}, {kind}",
                    "a plain def that returns them",
                )
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
    wrong = next((k for k, x in enumerate(leaves) if not _is_array(x)), None)
    if wrong is None:
        return
    path = leaf_paths(tree)[wrong]
    came = f"{leaves[wrong]!r:.40} ({type(leaves[wrong]).__name__})"
    raise TypeError(
        beats(
            called,
            f"a {what}, which the compiled program is given",
            came + (f' at "{path}"' if path else ""),
            instead
            or "a batch without it: what does not change is bound before, as by "
            "make_step(functools.partial(loss, ...), ...)",
        )
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
        raise TypeError(
            beats(
                called,
                f"a function of {len(args)} arguments",
                f"{function_name(fun)}{signature}: {error}",
                f"lambda {', '.join(map(str, args))}: ...",
            )
        ) from None
