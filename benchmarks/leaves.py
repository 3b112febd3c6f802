"""(j) Many leaves: refusing, measuring, and choosing parameters by a predicate."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from measure import seconds, side_by_side

import stopgrad_jax as sg

LEAVES = 500
SIZES = (1_000, 10_000, 100_000)


def loss(params, x):
    """Use every leaf; stop every other one."""
    y = x
    for k in range(0, LEAVES, 2):
        y = jnp.tanh(y * params[f"w{k}"]) + jax.lax.stop_gradient(params[f"w{k + 1}"])
    return jnp.sum(y)


def _anew():
    """Return the loss as another function: nothing that is known of it is used."""
    return lambda params, x: loss(params, x)


def _asked(**options):
    with contextlib.suppress(ValueError):  # of "error": it refuses
        return sg.gradients(_anew(), "params", **options)(*_args())


def _measured():
    stats = sg.gradient_stats(_anew(), "params")(*_args())
    return [s.norm for s in stats.values()]


@functools.cache
def _args():
    return {f"w{k}": jnp.full(4, 0.9) for k in range(LEAVES)}, jnp.ones(4)


def rows():
    """Name -> figures; the other side of the first two is `"none"`."""
    none = functools.partial(_asked, unconnected_gradients="none")
    refused = functools.partial(_asked, unconnected_gradients="error")
    yield f'j. "error" against "none", {LEAVES} leaves', side_by_side(refused, none)
    yield f'j. gradient_stats against "none", {LEAVES}', side_by_side(_measured, none)
    for size in SIZES:
        params = {f"layer{k}": {"w": np.zeros(1, np.float32)} for k in range(size)}
        chosen = functools.partial(
            sg.stop_gradient, params, where=lambda path, leaf: path.endswith("7/w")
        )
        took = seconds(chosen)
        yield f"j. where, {size} leaves", {"seconds": took, "per_leaf": took / size}
