"""From the trees that users hand in to gates of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._checks import require_broadcast
from stopgrad_jax._errors import shortened, type_of, wrong
from stopgrad_jax._trees import Split

from .primitive import gate
from .rule import Rule

# (cotangent, parameters) -> cotangent, for one array
Pull = Callable[..., Any]


def leaf_by_leaf(
    tree: Any, parameters: Mapping[str, Any], rule: Rule, called: str
) -> Any:
    """Gate each leaf by itself; each parameter is a prefix of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    require_gradient(leaves, called)
    columns = [_for_each_leaf(p, tree, name, called) for name, p in parameters.items()]
    out = []
    for k, leaf in enumerate(leaves):
        if not _jax.carries_gradient(leaf):
            out.append(leaf)
            continue
        x = jnp.asarray(leaf)
        pairs = zip(parameters, columns, strict=True)
        values = [_parameter(column[k], x, name, called) for name, column in pairs]
        out += gate([x], [x], values, rule)
    return structure.unflatten(out)


def all_at_once(tree: Any, parameters: Sequence[Any], rule: Rule, called: str) -> Any:
    """Gate all leaves together: the rule sees every cotangent of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    require_gradient(leaves, called)
    carry = Split([_jax.carries_gradient(x) for x in leaves])
    arrays = list(map(jnp.asarray, carry.chosen(leaves)))
    gated = gate(arrays, arrays, parameters, rule)
    return structure.unflatten(carry.joined(gated, leaves))


def require_gradient(leaves: Sequence[Any], called: str) -> None:
    """Refuse a tree in which there is nothing to gate."""
    if any(map(_jax.carries_gradient, leaves)):
        return
    types = [
        type_of(x) if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__
        for x in leaves
    ]
    instead = "the call on the float value, before it is rounded, cast or compared"
    if any(map(callable, leaves)):
        instead = "the call on what the function returns, or on its argument"
    raise wrong(
        TypeError,
        called,
        "at least one leaf that carries a gradient (float or complex)",
        ", ".join(dict.fromkeys(types)) or "a tree without leaves",
        instead,
    )


def axis_index(name: str, called: str) -> jax.Array:
    """Return this example's or shard's place along an axis, or say there is none."""
    try:
        return jax.lax.axis_index(name)
    except NameError:
        raise wrong(
            NameError,
            called,
            "axis_name is an axis of the vmap or shard_map around it",
            f"{name!r}, and no such axis here",
            f"jax.vmap(fun, axis_name={name!r})",
        ) from None


def in_dtype_of_both(pull: Callable[[Any, Any], Any], ct: Any, p: Any) -> Any:
    """Apply `pull` in the wider dtype of the two, and round once."""
    # In bfloat16 a float32 factor would be rounded before the product, and the product
    # once more. An integer has no precision to lose.
    inexact = jnp.issubdtype(p.dtype, jnp.inexact)
    wider = inexact and p.dtype.itemsize > ct.dtype.itemsize
    dtype = p.dtype if wider else ct.dtype
    return pull(ct.astype(dtype), ranked(p.astype(dtype), ct)).astype(ct.dtype)


def ranked(p: Any, ct: Any) -> Any:
    """Bring a parameter to the rank of the cotangent; a scalar stays one."""
    return jax.lax.expand_dims(p, range(ct.ndim - p.ndim)) if p.ndim else p


def _for_each_leaf(parameter: Any, tree: Any, name: str, called: str) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(parameter, tree))
    except ValueError as error:
        raise wrong(
            ValueError,
            called,
            f"{name} is one array, or a tree of them with the structure of the "
            "tree or a prefix of it",
            shortened(error),
            f"one {name} for all, or a tree of them",
        ) from None


def _parameter(value: Any, x: jax.Array, name: str, called: str) -> jax.Array:
    try:
        p = jnp.asarray(value)
    except TypeError:
        p = None
    kinds = (jnp.number, jnp.bool_)
    if p is None or not any(jnp.issubdtype(p.dtype, kind) for kind in kinds):
        came = repr(value)[:60] if p is None else type_of(p)
        raise wrong(TypeError, called, f"{name} is a number", came, f"{name}=1.0")
    if jnp.iscomplexobj(p) and not jnp.iscomplexobj(x):
        raise wrong(
            TypeError,
            called,
            f"{name} is real for a real value of {type_of(x)}",
            type_of(p),
            f"{name}.real, or {name}.imag",
        )
    instead = f"a scalar, or jnp.broadcast_to({name}, {x.shape})"
    require_broadcast(p, name, x, called, "the value", instead)
    # A Python number takes the value's dtype, as everywhere in JAX.
    weak = jnp.issubdtype(p.dtype, jnp.number) and getattr(p, "weak_type", False)
    return p.astype(x.dtype) if weak else p
