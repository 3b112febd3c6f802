"""What every public function must do under every transform, in every context.

The program is always F(X) = h(gate(X)) with h(y) = y**3 - 2y, row by row of a (B, n)
array; the sum of F is the loss. A row is what the gate is given: in `vmap`, `scan` and
`shard_map` there are several, elsewhere one. Expected numbers are closed forms in
NumPy: `value`, `pull` (cotangent), `push` (tangent) and the derivative of `pull`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from programs import mesh

import stopgrad_jax as sg

h = lambda y: y**3 - 2 * y
dh = lambda y: 3 * y**2 - 2
ddh = lambda y: 6 * y
PARAMETERS = (4.0, 3.0, 2.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function: how it is called on a tree, and its closed form on a row."""

    call: Callable  # tree, p, axis -> tree
    pull: Callable  # ct, p, x -> ct of x
    dpull: Callable  # ct, p, x, d -> its derivative along d in ct (all are symmetric)
    push: Callable = lambda t, p: t  # t, p -> tangent
    value: Callable = lambda x, p: x
    dx_pull: Callable = lambda ct, u: 0.0  # derivative along u in x


def _linear(call, factor, value=lambda x, p: x):
    scaled = lambda ct, p, x=None: ct * factor(p)
    return Case(call, scaled, lambda ct, p, x, d: d * factor(p), scaled, value)


def _norm(ct, p, x, d=None):
    length = np.linalg.norm(ct)
    if length <= p:
        return ct if d is None else d
    if d is None:
        return ct * (p / length)
    return p * (d / length - ct * np.vdot(ct, d).real / length**3)


def _like(tree, p):
    return jax.tree.map(lambda x: jnp.broadcast_to(p, x.shape).astype(x.dtype), tree)


def _transform(tree, p, _):
    squared = lambda ct: ct * ct * p.astype(ct.dtype)
    return sg.transform_gradient(tree, lambda ct: jax.tree.map(squared, ct))


def _floats(function):
    """Apply a function to the float leaves of a tree."""
    is_int = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.integer)
    return lambda tree: jax.tree.map(
        lambda leaf: leaf if is_int(leaf) else function(leaf), tree
    )


_double = _floats(lambda x: 2 * x)
_square = sg.with_backward(
    _floats(jnp.square),
    lambda ct, out, x: (
        jax.tree.map(
            lambda c, leaf: None if c is None else 3 * leaf * c,
            ct,
            x,
            is_leaf=lambda c: c is None,
        ),
    ),
)

CASES = {
    "stop_gradient": _linear(lambda x, p, _: sg.stop_gradient(x), lambda p: 0.0),
    "scale_gradient": _linear(
        lambda x, p, _: sg.scale_gradient(x, p / 2), lambda p: p / 2
    ),
    "reverse_gradient": _linear(
        lambda x, p, _: sg.reverse_gradient(x, p), lambda p: -p
    ),
    "mask_gradient": _linear(
        lambda x, p, _: sg.mask_gradient(x, p > 2.5), lambda p: float(p > 2.5)
    ),
    "per_example": _linear(
        lambda x, p, axis: sg.per_example(x, axis) if axis else x, lambda p: 1.0
    ),
    "partition, combine": _linear(
        lambda x, p, _: sg.combine(*sg.partition(x, lambda path, leaf: True)),
        lambda p: 1.0,
    ),
    "replace_value": _linear(
        lambda x, p, _: sg.replace_value(x, _like(x, p)),
        lambda p: 1.0,
        lambda x, p: p + 0 * x,
    ),
    "straight_through": _linear(
        lambda x, p, _: sg.straight_through(_floats(jnp.round), _double)(x),
        lambda p: 2.0,
        lambda x, p: np.round(x),
    ),
    "clip_gradient": Case(
        lambda x, p, _: sg.clip_gradient(x, -1.0, p),
        lambda ct, p, x: np.clip(ct, -1.0, p),
        lambda ct, p, x, d: d * ((ct > -1.0) & (ct < p)),
    ),
    "clip_gradient_norm": Case(
        lambda x, p, _: sg.clip_gradient_norm(x, p), _norm, _norm
    ),
    "transform_gradient": Case(
        _transform, lambda ct, p, x: ct * ct * p, lambda ct, p, x, d: 2 * ct * p * d
    ),
    "transform_gradient, optax": Case(
        lambda x, p, _: sg.transform_gradient(x, optax.clip_by_global_norm(p)),
        _norm,
        _norm,
    ),
    "replace_nonfinite_gradient": Case(
        lambda x, p, _: sg.replace_nonfinite_gradient(x, p),
        lambda ct, p, x: ct,
        lambda ct, p, x, d: d,
    ),
    "with_backward": Case(
        lambda x, p, _: _square(x),
        lambda ct, p, x: 3 * x * ct,
        lambda ct, p, x, d: 3 * x * d,
        value=lambda x, p: x**2,
        dx_pull=lambda ct, u: 3 * u * ct,
    ),
    "prevent_gradient": Case(lambda x, p, _: sg.prevent_gradient(x), None, None),
}


# Trees: a row of n numbers as the tree that the gate is given, and back ---------------

TREES = {
    "array": (3, lambda row: row, lambda tree: tree),
    "pytree": (
        3,
        lambda row: {"a": row[:2], "b": [row[2]]},
        lambda tree: jnp.concatenate([tree["a"], tree["b"][0][None]]),
    ),
    "int leaf": (
        2,
        lambda row: (row, jnp.arange(2)),
        lambda tree: tree[0] + 0 * tree[1].astype(tree[0].dtype),
    ),
    "empty": (0, lambda row: row, lambda tree: tree),
    "scalar": (1, lambda row: row[0], lambda tree: tree[None]),
}


# Contexts: (function of a row and its parameter) -> function of all rows -------------


def _rows(wrap):
    return lambda f, X, ps: wrap(f)(X[0], ps[0])[None]


def _while(f):
    def loop(x, p):
        body = lambda state: (state[0] + 1, f(state[2], p), state[2])
        start = (0, jnp.zeros_like(x), x)
        return jax.lax.while_loop(lambda state: state[0] < 1, body, start)[1]

    return loop


def _scan(f, X, ps):
    step = lambda count, row: (count + 1, f(*row))
    return jax.lax.scan(step, 0, (X, ps))[1]


def _shard_map(check):
    def sharded(f, X, ps):
        part = lambda X, ps: f(X[0], ps[0])[None]
        return jax.jit(
            jax.shard_map(
                part, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=check
            )
        )(X, ps)

    return sharded


@dataclasses.dataclass(frozen=True)
class Context:
    """How rows reach the function, how many there are, and the name of their axis."""

    run: Callable  # f, X (B, n), ps (B,) -> (B, n)
    rows: int = 1
    axis: str | None = None
    one_value: bool = False  # one row of X for all
    one_parameter: bool = False


CONTEXTS = {
    "plain": Context(_rows(lambda f: f)),
    "jit": Context(_rows(jax.jit)),
    "vmap, input": Context(
        lambda f, X, ps: jax.vmap(lambda x: f(x, ps[0]), axis_name="d")(X),
        2,
        "d",
        one_parameter=True,
    ),
    "vmap, parameter": Context(
        lambda f, X, ps: jax.vmap(lambda p: f(X[0], p), axis_name="d")(ps),
        2,
        "d",
        one_value=True,
    ),
    "vmap, both": Context(lambda f, X, ps: jax.vmap(f, axis_name="d")(X, ps), 2, "d"),
    "scan": Context(_scan, 2),
    "while": Context(_rows(_while)),
    "cond": Context(_rows(lambda f: lambda x, p: jax.lax.cond(p > 0, f, _other, x, p))),
    "checkpoint": Context(_rows(jax.checkpoint)),
    "shard_map": Context(_shard_map(True), 4, "d"),
    "shard_map, unchecked": Context(_shard_map(False), 4, "d"),
}


def _other(x, p):
    return jnp.zeros_like(x)
