"""Sum a gradient up where it is made, so that it is never stored.

At each value a gate hands the cotangent on as it is, and a summary of it to a
*channel*: a small operand that is differentiated by and that nothing else uses. In a
scan there is a channel for each step, so a gradient over all steps is never stacked,
and in a `shard_map` one for each device: they are put together outside of it, where a
largest entry need not be told from a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .primitive import gate
from .rule import Rule

# Sum of squares of what is left when it is divided by the largest magnitude; that one;
# number of nonzeros, of nonfinites. So no square leaves the range that the norm is in.
SUMMED = 4
SQUARES, LARGEST = 0, 1


def summary_dtype(dtype: Any) -> Any:
    """Return what cotangents of a dtype are summed in: float32, or float64."""
    wide = jnp.finfo(dtype).dtype.itemsize > 4
    return jnp.dtype("float64" if wide else "float32")


@functools.partial(jax.jit, inline=True)
def summary(ct: jax.Array) -> jax.Array:
    """Sum up one cotangent; compiled, as calls are what takes long on small arrays."""
    size = jnp.abs(ct).astype(summary_dtype(ct.dtype))
    counts = jnp.count_nonzero(ct), jnp.count_nonzero(~jnp.isfinite(ct))
    largest = jnp.max(size, initial=0)
    # None is larger than the largest; that is said to keep XLA from squaring first what
    # is divided, where it knows the cotangent.
    unit = _unit(largest)
    parts = jnp.minimum(size / unit, largest / unit)
    sums = jnp.sum(jnp.square(parts)), largest, *counts
    return jnp.stack([x.astype(size.dtype) for x in sums])


def norm(totals: jax.Array) -> jax.Array:
    """Return the norm of what was summed up."""
    return _unit(totals[..., LARGEST]) * jnp.sqrt(totals[..., SQUARES])


def _unit(largest: jax.Array) -> jax.Array:
    """Return what squares are taken in; it is no part of the norm, so a constant.

    Not to the end of the range: XLA may divide by it as a product with its inverse.
    """
    power = 100 if largest.dtype == jnp.float32 else 1000
    least, most = (jnp.asarray(2.0**x, largest.dtype) for x in (-power, power))
    return jax.lax.stop_gradient(jax.lax.clamp(least, largest, most))


def _in_unit(totals: jax.Array, largest: jax.Array) -> jax.Array:
    """Return summaries whose squares are those in the unit of another magnitude."""
    part = _unit(totals[..., LARGEST]) / _unit(largest)
    return totals.at[..., SQUARES].multiply(jnp.square(part))


def channel(aval: Any, counts: Sequence[int]) -> jax.Array:
    """Return what `summed` takes for a value of which there are so many copies."""
    dtype = summary_dtype(aval.dtype)
    with _jax.at_width_of(aval):
        zeros = jnp.zeros((*counts, SUMMED), dtype)
    # As its value: else what comes to it would be added over the devices around.
    return _jax.vary(zeros, _jax.varying(aval))


def over_devices(totals: jax.Array, kinds: Sequence[Any]) -> tuple[jax.Array, int]:
    """Put a channel's summaries of all devices together; return how many there were."""
    count = 1
    for axis, copies in reversed([*enumerate(kinds)]):
        if copies.devices:
            count *= copies.count
            largest = jnp.max(totals[..., LARGEST], axis, keepdims=True)
            sums = jnp.sum(_in_unit(totals, largest), axis)
            totals = sums.at[..., LARGEST].set(jnp.squeeze(largest, axis))
    return totals, count


def over_axes(totals: jax.Array) -> tuple[jax.Array, int]:
    """Put the summaries of all shards together, called in a `shard_map` or `pmap`."""
    axes = tuple(_jax.varying(jax.typeof(totals)) | _jax.unchecked_axes())
    if not axes:
        return totals, 1
    # The largest has no derivative over devices: it is a constant to one.
    largest = jax.lax.pmax(jax.lax.stop_gradient(totals[..., LARGEST]), axes)
    sums = jax.lax.psum(_in_unit(totals, largest), axes)
    return sums.at[..., LARGEST].set(largest), jax.lax.psum(1, axes)


def summed(value: jax.Array, channel: jax.Array) -> jax.Array:
    """Return the value; its cotangent's summary becomes that of the channel."""
    return gate([value], [value, channel], (), _RULE)[0]


def _pull(cts: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
    (ct,) = cts
    return [ct, summary(ct)]


_RULE = Rule(
    "gradient_stats", _pull, forward="gradient_stats has no forward derivative"
)
