"""Quantize vectors to the nearest row of a codebook that learns."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from stopgrad_jax._errors import beats, type_of
from stopgrad_jax.gates import stop_gradient
from stopgrad_jax.substitution import replace_value

from .grid import direction, dot
from .inputs import real, wide

__all__ = ["VectorQuantized", "vector_quantize"]


class VectorQuantized(NamedTuple):
    """What `vector_quantize` returns.

    Attributes:
      quantized: the nearest code of each vector, of z's shape and dtype. Its gradient
        goes to z alone.
      indices: the codes' rows in the codebook, int32.
      codebook_loss: `mean((stop(z) - code)**2)`, which moves the codes.
      commitment_loss: `mean((z - stop(code))**2)`, which moves z.
    """

    quantized: jax.Array
    indices: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


def vector_quantize(
    z: jax.typing.ArrayLike,
    codebook: jax.typing.ArrayLike,
    *,
    gradient: Literal["straight_through", "rotation"] = "straight_through",
) -> VectorQuantized:
    """Take the nearest code of each vector, and the two losses that train it.

    The losses are computed from the code itself. Computed from `quantized`, as is
    easily done by mistake, the gradient of the codebook would be zero in silence.

    Forward: the code with the least `norm(code)**2 - 2 * dot(z, code)`, in float32 at
    least; of equal ones the first.
    Backward, of `quantized`: to z alone, in both modes. "straight_through": the
    cotangent g. "rotation": `lam * R.T @ g` for the rotation and scale that bring z to
    its code q, held fixed: `lam = norm(q) / norm(z)` and, for q^ and z^ of norm 1 and w
    their sum made so, `R = I - 2 w w.T + 2 q^ z^.T`. A gradient keeps its angle to the
    code. Where z or q is 0 beside the other, or they point in opposite directions
    (within 0.1 degrees in float32), there is no such rotation, and g passes.
    Backward, of the losses: to the codebook and to z, each to one alone.

    Both are biased; they agree where z is its code. Straight-through has one gradient
    for all z with the same code, rotation one that depends on where z is.

    Args:
      z: a floating array; its last axis is the code.
      codebook: a floating array, one code per row.
      gradient: "straight_through" or "rotation".

    Returns:
      A `VectorQuantized` (quantized, indices, codebook_loss, commitment_loss). The
      losses are means over all entries, in float32 at least; their weights are yours,
      as in `codebook_loss + 0.25 * commitment_loss`. Where z is nan, so is quantized.

    Raises:
      TypeError: z or codebook is no floating array.
      ValueError: z is a scalar, the codebook is no matrix of z's width with a row, or
        the gradient is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> codebook = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(sg.quantize.vector_quantize(jnp.array([3.0, 4.0]), codebook)[0])
        [0. 2.]
        >>> def f(z, gradient):
        ...     out = sg.quantize.vector_quantize(z, codebook, gradient=gradient)
        ...     return out.quantized[1]
        >>> for gradient in ("straight_through", "rotation"):
        ...     print(jax.grad(f)(jnp.array([3.0, 4.0]), gradient).round(4))
        [0. 1.]
        [0.24 0.32]

    Reference:
      van den Oord, Vinyals and Kavukcuoglu (2017), "Neural Discrete Representation
      Learning"; Fifty et al. (2024), "Restructuring Vector Quantization with the
      Rotation Trick". vector-quantize-pytorch has both.
    """
    called = f"vector_quantize(z, codebook, gradient={gradient!r})"
    z = real(z, "z", called, rank=1)
    codes = _codebook(codebook, z, called)
    if gradient not in ("straight_through", "rotation"):
        expected = 'gradient is "straight_through" or "rotation"'
        instead = 'gradient="rotation"'
        raise ValueError(beats(called, expected, f"{gradient!r}", instead))
    given, codes = wide(z), wide(codes)
    dtype = jnp.promote_types(given.dtype, codes.dtype)
    given, codes = given.astype(dtype), codes.astype(dtype)
    indices = _nearest(stop_gradient(given), stop_gradient(codes))
    # An index is in bounds and not negative: no instructions to make it so.
    code = codes.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)

    fixed, target = stop_gradient((given, code))
    source = _rotated(given, target) if gradient == "rotation" else given
    # The nearest code of nan is some code; nan must not end here unseen.
    value = jnp.where(jnp.isnan(fixed), fixed, target)
    return VectorQuantized(
        replace_value(source, value).astype(z.dtype),
        indices,
        jnp.mean(jnp.square(fixed - code)),
        jnp.mean(jnp.square(given - target)),
    )


def _nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
    half_squares = jnp.sum(jnp.square(codes), -1) / 2
    dots = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.broadcast_to(half_squares, dots.shape) - dots
    return jax.lax.argmin(scores, scores.ndim - 1, jnp.int32)


def _rotated(z: jax.Array, code: jax.Array) -> jax.Array:
    """Rotate and scale z to the code, as a map that is linear in z."""
    eps = jnp.finfo(z.dtype).eps
    (z_unit, z_norm), (unit, norm) = direction(stop_gradient(z)), direction(code)
    both = z_unit + unit
    square = dot(both, both)
    # Nearer to opposite than this, rounding decides where `both` points.
    turns = (z_norm > eps * norm) & (norm > eps * z_norm) & (square > 16 * eps)
    one = jnp.ones_like(norm)
    factor = jnp.where(turns, norm / jnp.where(turns, z_norm, one), one)
    twice = jnp.where(turns, 2 / jnp.where(turns, square, one), 0 * one)
    onto = jnp.where(turns, 2 * one, 0 * one)
    reflected = z - (twice * dot(both, z)) * both
    return factor * (reflected + (onto * dot(z_unit, z)) * unit)


def _codebook(codebook: Any, z: jax.Array, called: str) -> jax.Array:
    codes = real(codebook, "codebook", called)
    if codes.ndim != 2 or codes.shape[1] != z.shape[-1] or not codes.shape[0]:
        expected = (
            f"codebook has the shape (codes, {z.shape[-1]}), for z of {type_of(z)}"
        )
        instead = f"jnp.zeros((512, {z.shape[-1]})), or a linear layer on z before"
        raise ValueError(beats(called, expected, type_of(codes), instead))
    return codes
