"""Where arrays are that a program is run on step by step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax


def gathered(x: Any) -> Any:
    """Bring a value that is spread over several devices to one place.

    Step by step, each operation on it would be compiled for all of them. Where the
    sharding is a part of the type it stays as it is; but what an equation of a shard
    gave by itself is no shard, whatever its type says.
    """
    if not isinstance(x, jax.Array) or _jax.is_key(x):
        return x
    types = getattr(jax.typeof(x).sharding.mesh, "axis_types", ())
    if jax.sharding.AxisType.Manual in types:
        return np.asarray(x)
    spread = len(x.sharding.device_set) > 1
    explicit = jax.sharding.AxisType.Explicit in types
    return np.asarray(x) if spread and not explicit else x


def placed_like(array: np.ndarray, like: Any) -> Any:
    """Return an array on the devices, and in the sharding, of another one.

    One that nobody has put anywhere may be used with arrays of any device.
    """
    placed = isinstance(like, jax.Array) and like.committed
    return jax.device_put(array, like.sharding) if placed else jnp.asarray(array)
