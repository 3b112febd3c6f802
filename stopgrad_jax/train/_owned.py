"""Which arrays a step may donate: those that steps made, never one of the caller's.

A donated array is deleted. What a caller passes to `init`, puts into a state, or holds
beside it, must live on, and so must another state; so an array is donated only if it
was made together with the state, and what else stands in a state's place is copied
first. What is made together is marked with one owner, the state's number of steps too,
and that tells the state's own. A mark is no promise of JAX's: an array that lost it is
copied once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax


def copied(leaf: Any, owner: object | None = None) -> jax.Array:
    """Copy an array, so that the copy may be donated; a number becomes an array.

    Weak types end here: an update would make them strong, and the step trace twice.
    """
    if not isinstance(leaf, jax.Array):
        copy = jnp.array(leaf, dtype=jnp.asarray(leaf).dtype)
    elif jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a PRNG key
        copy = jnp.copy(leaf)
    else:
        copy = jnp.array(leaf, dtype=leaf.dtype)
    if owner is not None:
        _jax.mark(copy, owner)
    return copy


def owned(
    leaves: Sequence[Any], elsewhere: Iterable[Any], owner: object | None
) -> list[Any]:
    """Return these leaves, with a copy of each that may not be donated.

    That is one of the caller's or of another state, one that occurs twice (L-BFGS has
    the parameters in its state), and one that the same program reads: `elsewhere`.
    """
    seen, result = set(map(id, elsewhere)), []
    for leaf in leaves:
        own = owner is not None and _jax.owner_of(leaf) is owner
        theirs = isinstance(leaf, jax.Array) and not own
        result.append(copied(leaf, owner) if theirs or id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return result


def made(results: Iterable[Any], inputs: Iterable[Any], used_up: object | None) -> None:
    """Mark what a program returned as made together.

    But for what it only handed through, if that is not of the state that it used up.
    """
    seen, owner = set(map(id, inputs)), object()
    for leaf in results:
        if id(leaf) not in seen or (used_up and _jax.owner_of(leaf) is used_up):
            _jax.mark(leaf, owner)


def is_used_up(leaf: Any) -> bool:
    """Tell an array that was donated."""
    return (
        isinstance(leaf, jax.Array) and not _jax.is_traced(leaf) and leaf.is_deleted()
    )
