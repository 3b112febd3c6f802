"""What estimators take: real arrays, steps and bounds that fit them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stopgrad_jax._checks import (
    UNBOUNDED,
    is_known,
    real_floats,
    real_number,
    require_broadcast,
    whole,
)
from stopgrad_jax._errors import type_of, wrong

__all__ = [
    "codes",
    "parameter",
    "per_entry",
    "real",
    "require",
    "require_positive",
    "wide",
    "wider",
]


def real(x: Any, name: str, called: str, *, rank: int = 0) -> jax.Array:
    """Return x as a floating array, or refuse it; of rank 1 it holds codes."""
    array = real_floats(x, name, called)
    came = type_of(array)
    if array.ndim < rank:
        expected = f"{name} has at least {rank} axis, the last of them the code's"
        raise wrong(ValueError, called, expected, came, f"{name}[None]")
    if rank and not array.shape[-1]:
        expected = f"{name} has codes of at least 1 entry along its last axis"
        instead = f"the call without it: there is nothing in {name} to quantize"
        raise wrong(ValueError, called, expected, came, instead)
    return array


def parameter(value: Any, x: jax.Array, name: str, called: str) -> jax.Array:
    """Return a step or bound in the dtype of x, having checked that it broadcasts."""
    array = real_number(value, name, called)
    instead = f"a scalar {name}, or a shape with 1 where it is shared"
    require_broadcast(array, name, x, called, "x", instead)
    return array.astype(x.dtype)


def per_entry(value: jax.Array, x: jax.Array) -> jax.Array:
    """Return a step or bound for each entry of x."""
    return jnp.broadcast_to(value, x.shape)


def require(
    holds: Any, called: str, expected: str, came: str, instead: str, *values: Any
) -> None:
    """Raise unless a condition holds of values that are all known; else ask nothing."""
    if all(map(is_known, values)) and not np.all(holds(*map(np.asarray, values))):
        raise wrong(ValueError, called, expected, came.format(*values), instead)


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
