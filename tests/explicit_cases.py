"""Programs on a mesh of 4 x 2 devices, and their arrays with and without it.

Each is a function of (w, x) in which h = tanh(x @ w) has a name and the result is the
sum of its squares; `x` lies in rows over d, `w` in columns over m.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import stopgrad_jax as sg

W = np.linspace(-0.6, 0.8, 8, dtype=np.float32).reshape(2, 4)
X = np.linspace(-0.9, 0.7, 16, dtype=np.float32).reshape(8, 2)


def mesh_of(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)


def placed(mesh):
    """Return (w, x) on the mesh that is set."""
    put = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, P(*spec)))
    return put(W, None, "m"), put(X, "d")


def layer(w, x):
    return jnp.sum(sg.name(jnp.tanh(x @ w), "h") ** 2)


def _rectified(w, x):
    h = sg.name(jnp.tanh(x @ w), "h")
    squares = jax.nn.relu(h) ** 2 + jax.nn.relu(-h) ** 2
    return jnp.sum(jnp.where(h > 9, 0.0, squares))


def _vmapped(w, x):
    return jnp.sum(jax.vmap(lambda row: sg.name(jnp.tanh(row @ w), "h") ** 2)(x))


def _sharded(check_vma, axes):
    def f(w, x):
        def part(w, x):
            total = jnp.sum(sg.name(jnp.tanh(x @ w), "h") ** 2)
            return jax.lax.psum(total, axes)

        specs = {
            "in_specs": (P(None, "m") if "m" in axes else P(), P("d")),
            "out_specs": P(),
            "axis_names": set(axes),
            "check_vma": check_vma,
        }
        return jax.shard_map(part, **specs)(w, x)

    return f


PROGRAMS = {
    "plain": layer,
    "jit": jax.jit(layer),
    "rectified": _rectified,
    "remat": jax.checkpoint(layer),
    "vmap": _vmapped,
    "cond": lambda w, x: jax.lax.cond(jnp.sum(w) < 99, layer, lambda w, x: 0.0, w, x),
    "shard_map over rows": _sharded(True, ("d",)),
    "unchecked over rows": _sharded(False, ("d",)),
}


def scanned(w, x):
    """Three steps of h <- tanh(h @ (w @ w.T)), by hand: see `scanned_by_hand`."""

    def step(h, _):
        return sg.name(jnp.tanh(h @ square(w)), "h"), None

    return jnp.sum(jax.lax.scan(step, x, None, 3)[0] ** 2)


def square(w):
    """Return w @ w.T; of an axis that is sharded on both sides JAX makes no product."""
    return jnp.sum(w[:, None] * w[None], -1)


def scanned_by_hand(w, x, d):
    def step(h, d):
        return jnp.tanh(h @ square(w)) + d, None

    return jnp.sum(jax.lax.scan(step, x, d)[0] ** 2)
