"""What functions close over: traced values, and the variables that these are.

Part of `_jax.py`, the only door to JAX that is version-dependent or not public.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.core
from jax.extend.core import Literal


def tracers_in(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the traced values among some values, and those that functions hold.

    Closures, defaults and partials are looked through, and the custom rules in them.
    """
    waiting, seen = list(values), set[int]()
    while waiting:
        x = waiting.pop()
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
