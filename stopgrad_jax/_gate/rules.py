"""The rules of the public gates: (cotangents, parameters) -> cotangents.

All but the norm act on one leaf.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .rule import Rule
from .trees import in_dtype_of_both, ranked


def _scaled(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(jnp.multiply, cts[0], parameters[0])]


def _reversed(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(lambda ct, p: ct * -p, cts[0], parameters[0])]


def _negated(cts: Any, parameters: Any) -> Any:
    return [-cts[0]]


def _masked(cts: Any, parameters: Any) -> Any:
    # No product with the mask: that of a nan or an infinity and 0 is nan.
    kept = ranked(parameters[0], cts[0])
    return [jnp.where(kept, cts[0], jnp.zeros((), cts[0].dtype))]


def _same(cts: Any, parameters: Any) -> Any:
    return cts


SCALE = Rule("scale_gradient", _scaled, linear=True)
REVERSE = Rule("reverse_gradient", _reversed, linear=True)
NEGATE = Rule("reverse_gradient", _negated, linear=True)
MASK = Rule("mask_gradient", _masked, linear=True)
SAME = Rule("per_example", _same, linear=True)
VALUE_OF = Rule("replace_value", _same, linear=True)
VALUE_OF_FORWARD = Rule("straight_through", _same, linear=True)


def _between(cts: Any, parameters: Any) -> Any:
    return _above(_below(cts, parameters[1:]), parameters)


def _above(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(jnp.maximum, cts[0], parameters[0])]


def _below(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(jnp.minimum, cts[0], parameters[0])]


def _finite(cts: Any, parameters: Any) -> Any:
    value = ranked(parameters[0].astype(cts[0].dtype), cts[0])
    return [jnp.where(jnp.isfinite(cts[0]), cts[0], value)]


BETWEEN = Rule("clip_gradient", _between)
ABOVE = Rule("clip_gradient", _above)
BELOW = Rule("clip_gradient", _below)
FINITE = Rule("replace_nonfinite_gradient", _finite)


@dataclasses.dataclass(frozen=True)
class NormClip:
    """Scale cotangents down to a norm."""

    axes: tuple[str, ...]

    def __call__(self, cts: Any, parameters: Any) -> Any:
        # In float32 at least: a float16 cannot hold the square of 300.
        real = (jnp.finfo(ct.dtype).dtype for ct in cts)
        dtype = max(jnp.dtype("float32"), *real, key=lambda d: d.itemsize)
        squares = [jnp.sum(jnp.square(jnp.abs(ct).astype(dtype))) for ct in cts]
        total = sum(squares[1:], squares[0])
        if self.axes:
            total = jax.lax.psum(total, self.axes)
        factor = _shrink(total, parameters[0].astype(dtype))
        return [in_dtype_of_both(jnp.multiply, ct, factor) for ct in cts]


@jax.custom_jvp
def _shrink(square: jax.Array, limit: jax.Array) -> jax.Array:
    """Return min(1, limit / norm), 1 for a norm of 0, nan for one of nan."""
    smallest = jnp.finfo(square.dtype).tiny
    return jnp.minimum(limit / jnp.sqrt(jnp.maximum(square, smallest)), 1)


@_shrink.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # By hand, since a zero cotangent has a norm without derivative: 0 * inf is nan.
    (square, limit), (square_dot, limit_dot) = primals, tangents
    factor = _shrink(square, limit)
    norm = jnp.sqrt(jnp.where(factor < 1, square, jnp.ones_like(square)))
    slope = limit_dot / norm - limit / (2 * norm**3) * square_dot
    return factor, jnp.where(factor < 1, slope, jnp.zeros_like(slope))
