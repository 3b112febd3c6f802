"""Primitives that ask JAX's derivative about a value, and leave it as it is.

All take part where the derivative passes by, and nowhere else: what JAX does not
differentiate, they do not make it differentiate. They compile to nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, mlir

import stopgrad_jax._jax as _jax
from stopgrad_jax._gate.primitive import gate
from stopgrad_jax._gate.rule import Rule

tap_p = _jax.Primitive("tap")  # value, shift -> value
still_p = _jax.Primitive("still")  # value, moved, token -> moved
instead_p = _jax.Primitive("instead")  # value, other -> other


def tap(value: Any, shift: Any) -> jax.Array:
    """Return `value`; if it has a tangent, that of `shift` is added.

    So the derivative by what `shift` is made of is the cotangent that arrives here,
    times the derivative of `shift`.
    """
    return tap_p.bind(value, shift)


def still(value: Any, moved: Any, token: Any) -> jax.Array:
    """Return `moved`, or `value` itself if no tangent gets to it.

    `token` is something that is differentiated by, for JAX to ask at all.
    """
    return still_p.bind(value, moved, token)


def instead(value: Any, other: Any) -> jax.Array:
    """Return `other`, with the tangent of `value`."""
    return instead_p.bind(value, other)


def weighed(token: Any, sizes: Any) -> jax.Array:
    """Return `token * sizes`, but in reverse mode with magnitudes of cotangents.

    The derivative by `token` is the sum of `sizes`, each times how much it matters.
    """
    return gate([token.astype(sizes.dtype) * sizes], [token], [sizes], _MAGNITUDES)[0]


def handed_on(token: Any, x: Any) -> jax.Array:
    """Return `token * x`, in reverse mode; zero times what is not finite is zero.

    It is of an entry that does not move, or of one that does not count.
    """
    return gate([token.astype(x.dtype) * x], [token], [x], _PRODUCTS)[0]


def last_digit(x: Any) -> jax.Array:
    """Return how much rounding may change each entry of a value."""
    size = jnp.abs(x) * jnp.finfo(x.dtype).eps
    return jnp.where(jnp.isfinite(size), size, 0).astype(x.dtype)


def where_moved(moved: Any, size: Any) -> jax.Array:
    """Return the rounding of what moved; if all is stuck, rounding is what holds it."""
    return jnp.where(moved | ~jnp.any(moved), size, jnp.zeros_like(size))


def _pull(cts: Any, residuals: Any) -> list[Any]:
    (ct,), (sizes,) = cts, residuals
    total = jnp.sum(jnp.abs(ct) * jnp.abs(sizes))
    return [total.astype(jnp.result_type(float))]


def _pull_products(cts: Any, residuals: Any) -> list[Any]:
    (ct,), (x,) = cts, residuals
    none = (ct == 0) | (x == 0)
    total = jnp.sum(jnp.real(jnp.where(none, jnp.zeros_like(x), ct * x)))
    return [total.astype(jnp.result_type(float))]


_PRODUCTS = Rule("products", _pull_products, forward="products: in reverse mode only")
_MAGNITUDES = Rule("magnitudes", _pull, forward="magnitudes: in reverse mode only")


def _tap_jvp(primals: Any, tangents: Any) -> Any:
    # JAX does not differentiate through this value, and the shift must not make it.
    if type(tangents[0]) is ad.Zero:
        return primals[0], tangents[0]
    return primals[0], ad.add_tangents(*tangents)


def _still_jvp(primals: Any, tangents: Any) -> Any:
    value, moved, _ = primals
    # Only whether a tangent comes is asked: what has moved is not differentiated.
    held = type(tangents[0]) is ad.Zero
    return (value if held else moved), ad.Zero(jax.typeof(moved).to_tangent_aval())


def _instead_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


tap_p.def_impl(lambda value, shift: value)
still_p.def_impl(lambda value, moved, token: moved)
instead_p.def_impl(lambda value, other: other)
tap_p.def_abstract_eval(lambda value, shift: value)
still_p.def_abstract_eval(lambda value, moved, token: moved)
instead_p.def_abstract_eval(lambda value, other: other)
ad.primitive_jvps[tap_p] = _tap_jvp
ad.primitive_jvps[still_p] = _still_jvp
ad.primitive_jvps[instead_p] = _instead_jvp
mlir.register_lowering(tap_p, lambda ctx, value, shift: [value])
mlir.register_lowering(still_p, lambda ctx, value, moved, token: [moved])
mlir.register_lowering(instead_p, lambda ctx, value, other: [other])
