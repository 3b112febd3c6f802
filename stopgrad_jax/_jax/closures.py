"""What functions close over: traced values, and the variables that these are.

Part of `_jax`, the only door to JAX that is version-dependent or not public.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.core
from jax.extend.core import Literal, Var


def tracers_in(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the traced values among some values, and those that functions hold.

    Closures, defaults, partials, methods and what `jax.jit` wraps are looked through,
    the custom rules in them, and what a rule was handed by `nondiff_argnums`.
    """
    waiting, seen = list(values), set[int]()
    while waiting:
        x = waiting.pop()
        # Functions hold each other, and one that calls itself holds itself.
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, jax.core.Tracer):
            yield x
        elif isinstance(x, tuple | list):
            waiting += x
        elif isinstance(x, dict):
            waiting += x.values()
        elif isinstance(x, functools.partial):
            waiting += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, types.FunctionType):
            waiting += [c.cell_contents for c in x.__closure__ or () if is_filled(c)]
            waiting += x.__defaults__ or ()
        elif isinstance(x, jax.custom_vjp | jax.custom_jvp):
            waiting += vars(x).values()
        elif isinstance(x, types.MethodType):
            waiting += [x.__func__, *_attributes(x.__self__)]
        elif type(x).__name__ == "Unhashable":  # JAX wraps such an argument in one
            waiting += [x.val, *(_attributes(x.val) if callable(x.val) else ())]
        elif callable(x) and not isinstance(x, type):
            waiting.append(getattr(x, "__wrapped__", None))


def _attributes(x: Any) -> list[Any]:
    """Return what an object of the user holds: its methods read it."""
    plain = isinstance(x, type | types.ModuleType | types.FunctionType)
    return [] if plain else list(getattr(x, "__dict__", {}).values())


def is_filled(cell: Any) -> bool:
    """Tell whether anything was assigned yet to a variable that is closed over."""
    try:
        cell.cell_contents  # noqa: B018 (raises where nothing was)
    except ValueError:
        return False
    return True


def variable_of(x: Any) -> Any:
    """Return the variable that a value of a traced program is there, or None.

    Not public: `val` of the tracers of `jax.make_jaxpr` and `jax.jit`. Without it, a
    value of a trace that has ended is not told from one of a trace that goes on.
    """
    variable = getattr(x, "val", None) if isinstance(x, jax.core.Tracer) else None
    return None if isinstance(variable, Literal) else variable  # that is a constant


def variable_under(x: Any) -> Any:
    """Return the variable of the program that a value is, under what maps it, or None.

    None also for what a derivative around the program computes with: an array.

    Not public: `val` and `primal` of the tracers of `jax.vmap`, `jax.jvp` and
    `jax.grad`. Without it, `sg.var` goes by the text of the program alone.
    """
    while isinstance(x, jax.core.Tracer):
        x = getattr(x, "val", None) if hasattr(x, "val") else getattr(x, "primal", None)
    return x if isinstance(x, Var) else None
