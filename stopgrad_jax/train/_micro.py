"""A batch in micro-batches: how it is split, and one of them picked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import leaf_paths
from stopgrad_jax._errors import wrong


def split(batch: Any, rounds: int, called: str) -> Any:
    """Split the leading axis, the micro-batches on axis 1.

    An array that is sharded over its leading axis then stays where it is: every
    device has a part of each micro-batch.
    """
    flat, structure = jax.tree.flatten(batch)
    sizes: dict[str, int] = {}
    called = f"{called[:-1]}, accumulate={rounds})"
    expected = f"arrays with one leading size, which {rounds} divides, in a batch"
    instead = "a batch with examples on the leading axis of each array"
    for path, leaf in zip(leaf_paths(batch), flat, strict=True):
        shape = jnp.shape(leaf)
        if not shape:
            came = f'a scalar at "{path}"' if path else "a scalar"
            raise wrong(ValueError, called, expected, came, instead)
        sizes[path or "batch"] = shape[0]
    if len(set(sizes.values())) != 1:
        came = f"leading sizes {sizes}" if sizes else "no array"
        raise wrong(ValueError, called, expected, came, instead)
    (size,) = set(sizes.values())
    if size % rounds or not size:
        near = max(rounds, size - size % rounds)
        instead = f"accumulate={_divisor(size, rounds)}, or {near} examples"
        came = f"a leading size of {size}"
        raise wrong(ValueError, called, expected, came, instead)
    return structure.unflatten(
        jnp.reshape(x, (size // rounds, rounds, *jnp.shape(x)[1:])) for x in flat
    )


def picked(micro: Any, key: Any, i: Any) -> tuple[Any, Any]:
    """Return the i-th micro-batch, and its key."""

    def pick(x: Any) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    part = jax.tree.map(pick, micro)
    return part, None if key is None else jax.random.fold_in(key, i)


def zeros(x: Any) -> jax.Array:
    """Zeros to add gradients to: in float32 at least, as rounding adds up too."""
    return wide(_jax.zeros(jax.typeof(x)))


def wide(x: jax.Array) -> jax.Array:
    """Return a number in float32 at least; an integer becomes a float."""
    if not jnp.issubdtype(x.dtype, jnp.inexact) or jnp.finfo(x.dtype).bits < 32:
        return x.astype(jnp.float32)
    return x


def _divisor(size: int, most: int) -> int:
    return next((k for k in range(min(most, size), 0, -1) if size % k == 0), 1)
