"""Functions of a cotangent that users hand in, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stopgrad_jax._checks import require_same_tree
from stopgrad_jax._errors import shortened, type_of, wrong


def stateless(transformation: Any, called: str) -> Callable[[Any], Any]:
    """Return an optax transformation as a function of a cotangent, if it can be one."""

    def update(ct: Any) -> Any:
        # A backward pass is run any number of times, and in no order: there is no next
        # step that could read a state.
        state = transformation.init(ct)
        if jax.tree.leaves(state):
            raise wrong(
                ValueError,
                called,
                "an optax transformation without state: a gate has none",
                f"state {jax.tree.structure(state)}",
                "it in the optimizer's chain, or a function of the cotangent",
            )
        try:
            return transformation.update(ct, state, None)[0]
        except ValueError as error:
            # By its text: optax has no type of its own for this error.
            if "params" not in str(error):
                raise
            raise wrong(
                ValueError,
                called,
                "an optax transformation that needs no parameters",
                shortened(error),
                "it in the optimizer's chain, where parameters are",
            ) from error

    return update


def same_types(ct: Any, out: Any, called: str) -> list[Any]:
    """Return the leaves of what a user's function made of a cotangent, type for type.

    Of another shape or dtype JAX would refuse it in the backward pass, in words that
    name neither the gate nor the function.
    """
    require_same_tree(out, ct, called)
    leaves = jax.tree.leaves(ct)
    results = [jnp.asarray(x) for x in jax.tree.leaves(out)]
    for old, new in zip(leaves, results, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise wrong(
                TypeError,
                called,
                f"the function keeps shape and dtype, {type_of(old)}",
                type_of(new),
                "new.astype(ct.dtype)"
                if old.shape == new.shape
                else f"a function that returns shape {old.shape}",
            )
    return results
