"""Check what is given for ys against the places that it is for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, type_of

from .select import Program
from .trace import Value


def cotangents(
    program: Program, y_tree: Any, grad_ys: Any, called: str
) -> list[tuple[Value, Any]]:
    """Pair each y that can be differentiated with its cotangent; None means ones.

    `grad_ys` is structured like the tree of places, or has None in place of a part.
    """
    given, structure = jax.tree.flatten(grad_ys, is_leaf=lambda x: x is None)
    try:
        trees = structure.flatten_up_to(y_tree)
    except ValueError as error:
        raise TypeError(
            beats(
                called,
                "grad_ys must be structured like ys, None entries apart",
                f"{structure} for {jax.tree.structure(y_tree)}",
                "one cotangent, or None, for each y",
            )
        ) from error
    pairs = []
    for ct, tree in zip(given, trees, strict=True):
        if ct is not None and not isinstance(tree, Value):
            raise TypeError(
                beats(
                    called,
                    "grad_ys must be structured like ys",
                    f"one entry where the y is a tree, {jax.tree.structure(tree)}",
                    "a tree of cotangents there, or None for ones",
                )
            )
        for y in jax.tree.leaves(tree):
            if isinstance(y, Value):
                aval = program.types[y]
                checked = _ones(aval, called) if ct is None else _like(ct, aval, called)
                if _jax.is_differentiable(aval):
                    pairs.append((y, _jax.vary(checked, _jax.varying(aval))))
    return pairs


def _ones(aval: Any, called: str) -> jax.Array:
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        remedy = "a y that is floating point"
        if _jax.is_differentiable(aval):
            remedy = "a y that is its real part or absolute value, or grad_ys"
        raise TypeError(
            beats(
                called,
                "without grad_ys, ys must be real floating point",
                type_of(aval),
                remedy,
            )
        )
    return _jax.filled(aval, 1)


def _like(ct: Any, aval: Any, called: str) -> jax.Array:
    ct = _jax.number_like(ct, aval)
    if not hasattr(ct, "dtype") or type_of(ct) != type_of(aval):
        raise TypeError(
            beats(
                called,
                f"this entry of grad_ys must be {type_of(aval)}, like its y",
                type_of(ct) if hasattr(ct, "dtype") else type(ct).__name__,
                "jax.numpy.ones_like(y), or None for ones",
            )
        )
    return jnp.asarray(ct)
