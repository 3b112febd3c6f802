"""Sum a gradient up where it is made, so that it is never stored.

At each value a gate hands the cotangent on as it is, and a summary of it to a
*channel*: a small operand that is differentiated by and that nothing else uses. In a
scan there is a channel for each step, so a gradient over all steps is never stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .gate import gate
from .rule import Rule

SUMMED = 4  # sum of squares, largest magnitude, number of nonzeros, of nonfinites


def summary_dtype(dtype: Any) -> Any:
    """Return what cotangents of a dtype are summed in: float32, or float64."""
    wide = jnp.finfo(dtype).dtype.itemsize > 4
    return jnp.dtype("float64" if wide else "float32")


def summary(ct: jax.Array) -> jax.Array:
    """Sum up one cotangent."""
    size = jnp.abs(ct).astype(summary_dtype(ct.dtype))
    counts = jnp.count_nonzero(ct), jnp.count_nonzero(~jnp.isfinite(ct))
    largest = jnp.max(size, initial=0)
    sums = jnp.sum(jnp.square(size)), largest, *counts
    return jnp.stack([x.astype(size.dtype) for x in sums])


def channel(aval: Any, steps: Sequence[int]) -> jax.Array:
    """Return what `summed` takes for a value in loops of so many steps."""
    return jnp.zeros((*steps, SUMMED), summary_dtype(aval.dtype))


def summed(value: jax.Array, channel: jax.Array) -> jax.Array:
    """Return the value; its cotangent's summary becomes that of the channel."""
    return gate([value], [value, channel], (), _RULE)[0]


def _pull(cts: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
    (ct,) = cts
    totals = summary(ct)
    axes = _jax.varying(jax.typeof(ct)) or _jax.unchecked_axes()
    if axes:
        # What comes to a channel is added over the devices, so the largest of all
        # comes from the first one alone.
        first = sum(jax.lax.axis_index(axis) for axis in axes) == 0
        largest = jnp.where(first, jax.lax.pmax(totals[1], tuple(axes)), 0)
        totals = totals.at[1].set(largest.astype(totals.dtype))
    return [ct, totals]


_RULE = Rule(
    "gradient_stats", _pull, forward="gradient_stats has no forward derivative"
)
