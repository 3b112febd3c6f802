"""What estimators take: real arrays, steps and bounds that fit them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, type_of

__all__ = [
    "UNBOUNDED",
    "codes",
    "known",
    "parameter",
    "per_entry",
    "real",
    "require",
    "require_positive",
    "whole",
    "wide",
    "wider",
]


def real(x: Any, name: str, called: str, *, rank: int = 0) -> jax.Array:
    """Return x as a floating array, or refuse it; of rank 1 it holds codes."""
    try:
        array = jnp.asarray(x)
        came, is_real = type_of(array), jnp.issubdtype(array.dtype, jnp.floating)
    except (TypeError, ValueError):  # the latter for None
        array, came, is_real = jnp.zeros(()), type(x).__name__, False
    if not is_real:
        instead = "the call on the float value, before it is rounded or cast"
        if jnp.issubdtype(array.dtype, jnp.integer):
            instead = f"{name}.astype(jnp.float32)"
        raise TypeError(
            beats(called, f"{name} is an array of real floats", came, instead)
        )
    if array.ndim < rank:
        expected = f"{name} has at least {rank} axis, the last of them the code's"
        raise ValueError(beats(called, expected, came, f"{name}[None]"))
    if rank and not array.shape[-1]:
        expected = f"{name} has codes of at least 1 entry along its last axis"
        instead = f"the call without it: there is nothing in {name} to quantize"
        raise ValueError(beats(called, expected, came, instead))
    return array


def parameter(value: Any, x: jax.Array, name: str, called: str) -> jax.Array:
    """Return a step or bound in the dtype of x, having checked that it broadcasts."""
    try:
        array = jnp.asarray(value)
        came = type_of(array)
        is_real = jnp.issubdtype(array.dtype, jnp.integer)
        is_real = is_real or jnp.issubdtype(array.dtype, jnp.floating)
    except (TypeError, ValueError):  # the latter for None
        array, came, is_real = jnp.zeros(()), repr(value)[:60], False
    if not is_real:
        raise TypeError(beats(called, f"{name} is a real number", came, f"{name}=1.0"))
    try:
        fits = jnp.broadcast_shapes(array.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        expected = f"{name} broadcasts to x, {type_of(x)}"
        instead = f"a scalar {name}, or a shape with 1 where it is shared"
        raise ValueError(beats(called, expected, came, instead))
    return array.astype(x.dtype)


def per_entry(value: jax.Array, x: jax.Array) -> jax.Array:
    """Return a step or bound for each entry of x."""
    return jnp.broadcast_to(value, x.shape)


def whole(value: Any, name: str, called: str, least: int, most: int) -> int:
    """Return a Python int between two bounds, or refuse it."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if least <= value <= most:
            return int(value)
    if most == UNBOUNDED:
        expected, instead = f"{name} is an int, at least {least}", f"{name}={least}"
    else:
        expected = f"{name} is an int from {least} to {most}"
        instead = f"{name}={min(max(least, 8), most)}"
    kind = TypeError if _jax.is_traced(value) else ValueError
    raise kind(beats(called, expected, f"{name}={value!r:.60}", instead))


def known(value: Any) -> bool:
    """Tell whether a number or array has a value now, to be checked."""
    numbers = bool | int | float | np.ndarray | np.generic | jax.Array
    return isinstance(value, numbers) and not _jax.is_traced(value)


def require(
    holds: Any, called: str, expected: str, came: str, instead: str, *values: Any
) -> None:
    """Raise unless a condition holds of values that are all known; else ask nothing."""
    if all(map(known, values)) and not np.all(holds(*map(np.asarray, values))):
        raise ValueError(beats(called, expected, came.format(*values), instead))


def wider(dtype: Any) -> Any:
    """Return a floating dtype of 32 bits at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def wide(x: jax.Array) -> jax.Array:
    """Return x in float32 at least: bfloat16 has too few digits to divide in."""
    return x.astype(wider(x.dtype))


def codes(qmin: Any, qmax: Any, called: str) -> tuple[int, int]:
    """Return the lowest and the highest code, as Python ints."""
    low = whole(qmin, "qmin", called, -UNBOUNDED, UNBOUNDED)
    high = whole(qmax, "qmax", called, -UNBOUNDED, UNBOUNDED)
    came, instead = "qmin={}, qmax={}", "qmin=-8, qmax=7, for 4 bits"
    require(np.less, called, "qmin is below qmax", came, instead, low, high)
    return low, high


def require_positive(step: Any, name: str, called: str) -> None:
    """Refuse a step that is known not to be positive."""
    came, instead = name + "={}", f"jnp.exp of a free number as {name}"
    require(lambda s: ~(s <= 0), called, f"{name} is positive", came, instead, step)


UNBOUNDED = 2**31 - 1
