"""Which arrays a step may donate: those that steps made, never one of the caller's.

A donated array is deleted. What a caller passes to `init`, puts into a state, or holds
beside it, must live on; so an array is donated only if a step made it, and what else
stands in a state's place is copied first. The copies and the results of steps are
marked; a mark is no promise of JAX's, and an array that lost it is copied once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax


def copied(leaf: Any) -> jax.Array:
    """Copy an array, so that the copy may be donated; a number becomes an array.

    Weak types end here: an update would make them strong, and the step trace twice.
    """
    if not isinstance(leaf, jax.Array):
        copy = jnp.array(leaf, dtype=jnp.asarray(leaf).dtype)
    elif jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a PRNG key
        copy = jnp.copy(leaf)
    else:
        copy = jnp.array(leaf, dtype=leaf.dtype)
    _jax.mark(copy)
    return copy


def owned(leaves: Sequence[Any], elsewhere: Iterable[Any]) -> list[Any]:
    """Return these leaves, with a copy of each that may not be donated.

    That is one of the caller's, one that occurs twice (L-BFGS has the parameters in
    its state), and one that the same program reads: `elsewhere`.
    """
    seen, result = set(map(id, elsewhere)), []
    for leaf in leaves:
        theirs = isinstance(leaf, jax.Array) and not _jax.is_marked(leaf)
        result.append(copied(leaf) if theirs or id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return result


def made(results: Iterable[Any], inputs: Iterable[Any]) -> None:
    """Mark what a program returned, but for what it only handed through."""
    seen = set(map(id, inputs))
    for leaf in results:
        if id(leaf) not in seen:
            _jax.mark(leaf)


def is_used_up(leaf: Any) -> bool:
    """Tell an array that was donated."""
    return (
        isinstance(leaf, jax.Array) and not _jax.is_traced(leaf) and leaf.is_deleted()
    )
