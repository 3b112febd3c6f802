"""How a result moves as its own rule says, from one copy of its operands to another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .copies import Copies, Copy

Push = Callable[[Copy, int, Copy], list[Any]]


def push_of(eqn: Any, copies: Copies) -> Push:
    """Return a rule's derivative: of differences of the operands, at copy number k."""
    if _jax.kind_of(eqn) == "gate":
        rule, (count, sources) = eqn.params["rule"], eqn.params["split"]
        end = count + sources

        def push(deltas: Copy, k: int, out: Copy) -> list[Any]:
            residuals = constants([*out, *copies[k][end:]])
            pull = functools.partial(rule.pull, residuals=residuals)
            return _transposed(pull, copies[0][:count], deltas[count:end])

        return push
    pairs = zip(*copies, strict=True)
    moved = [k for k, (x, y) in enumerate(pairs) if is_float(x) and x is not y]

    def push_custom(deltas: Copy, k: int, out: Copy) -> list[Any]:
        def function(*values: Any) -> list[Any]:
            operands = constants(copies[k])
            for place, value in zip(moved, values, strict=True):
                operands[place] = value
            return _jax.bind(eqn, *operands)

        here = constants([copies[k][place] for place in moved])
        dots = [deltas[place] for place in moved]
        if not moved:
            return [jnp.zeros_like(x) for x in out]
        if not _jax.has_own_vjp(eqn):
            return jax.jvp(function, here, dots)[1]
        # A `custom_vjp` has no forward mode: it is the transpose of its own transpose.
        values, pull = jax.vjp(function, *here)
        return _transposed(lambda cts: list(pull(list(cts))), values, dots)

    return push_custom


def followed_twice(push: Push, copies: Copies, base: list[Any]) -> list[list[Any]]:
    """Let a result move as its own rule says, where it has moved to."""
    deltas = [
        x - y if is_float(x) else x for x, y in zip(copies[1], copies[0], strict=True)
    ]
    slopes = push(deltas, 0, base)
    slopes = push(deltas, 1, list(map(shifted, base, slopes)))
    return [base, list(map(shifted, base, slopes))]


def _transposed(pull: Callable[..., Any], out: Any, deltas: Sequence[Any]) -> list[Any]:
    """Apply the linear map whose transpose is `pull`."""
    zeros = [jnp.zeros_like(x) for x in out]
    return list(jax.vjp(pull, zeros)[1](list(deltas))[0])


# Values


def is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def constants(values: Sequence[Any]) -> list[Any]:
    return [jax.lax.stop_gradient(x) if is_float(x) else x for x in values]


def shifted(x: Any, delta: Any) -> Any:
    return x + delta if is_float(x) else x
