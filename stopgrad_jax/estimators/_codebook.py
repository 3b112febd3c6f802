"""Quantize vectors to the nearest row of a codebook that learns."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from stopgrad_jax._checks import option
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.gates import stop_gradient
from stopgrad_jax.substitution import replace_value

from ._grid import direction, dot
from ._inputs import real, wide

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


@public
def vector_quantize(
    z: jax.typing.ArrayLike,
    codebook: jax.typing.ArrayLike,
    *,
    gradient: Literal["straight_through", "rotation"] = "straight_through",
) -> VectorQuantized:
    """Take the nearest code of each vector, and the two losses that train it.

    The losses are computed from the code itself. Computed from `quantized`, as is
    easily done by mistake, the gradient of the codebook would be zero in silence.

    Forward: the code nearest to z, bit for bit, found in float32 at least; of equal
    codes the first.
    Backward, of `quantized`: to z alone, in both modes. "straight_through": the
    cotangent g. "rotation": `lam * R.T @ g` for the rotation and scale that bring z to
    its code q, held fixed: `lam = norm(q) / norm(z)` and, for q^ and z^ of norm 1 and w
    their sum made so, `R = I - 2 w w.T + 2 q^ z^.T`. A gradient keeps its angle to the
    code. Where z or q is 0 beside the other, or they point in opposite directions
    (within 0.1 degrees in float32), there is no such rotation, and g passes.
    Backward, of the losses: to the codebook and to z, each to one alone.

    Both are biased; they agree where z is its code. For one g, straight-through has one
    gradient for all z with the same code, rotation one that depends on where z is.

    Distances are compared by a matrix product, measured from the middle m of the
    codebook (the median of a few codes), so an offset that z and codes share costs
    nothing. A code that is not the nearest is taken only if the squared distances of
    the two differ by less than `2 * (d + 4) * eps * r * (r + norm(z - m))`, with d the
    width, r the larger norm(code - m) of the two and eps that of the dtype. Codes in
    clusters far from one another, or a z far from all, are compared no better than
    that.

    There is one level, and every vector counts: the page of `quantize` has the lines
    for several levels and for padding. In a residual quantizer that goes on from
    `z - quantized` only the first level commits; with the codes stopped there, the sum
    of k results passes k times g.

    Args:
      z: a floating array; its last axis is the code.
      codebook: a floating array, one code per row.
      gradient: "straight_through" or "rotation".

    Returns:
      A `VectorQuantized` (quantized, indices, codebook_loss, commitment_loss). The
      losses are means over all entries, in float32 at least; their weights are yours,
      as in `codebook_loss + 0.25 * commitment_loss`. Where z is nan, so is quantized.
      An entry of z that is nan or infinite does not decide: its code is chosen as if it
      lay at m. A code with a nan or infinite entry is chosen only if all are such.

    Raises:
      TypeError: z or codebook is no floating array.
      ValueError: z is a scalar or its last axis empty, the codebook is no matrix of z's
        width with a row, or the gradient is unknown.

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
    option(gradient, "gradient", ("straight_through", "rotation"), called)
    given, codes = wide(z), wide(codes)
    dtype = jnp.promote_types(given.dtype, codes.dtype)
    given, codes = given.astype(dtype), codes.astype(dtype)
    indices = _nearest(stop_gradient(given), stop_gradient(codes))
    code = _rows(codes, indices)

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
    """Return the index of the nearest code; of equally near ones the first."""
    middle, size = _middle(codes)
    # |code|^2 / 2 - <z, code> orders codes as their distance does, and is a matrix
    # product. Measured from the origin it loses what is small beside |code|^2: 1,000
    # away from it, codes 1 apart are confused.
    z = z - jnp.expand_dims(middle, range(z.ndim - 1))
    z = jnp.where(jnp.isfinite(z), z, jnp.zeros_like(z))
    scaled = (codes - middle[None]) / size  # the square neither overflows nor vanishes
    halves = jnp.sum(jnp.square(scaled), -1) * (size / 2)
    usable = jnp.isfinite(halves)
    halves = jnp.where(usable, halves, jnp.full_like(halves, jnp.inf))
    scaled = jnp.where(usable[:, None], scaled, jnp.zeros_like(scaled))
    dots = jnp.matmul(z, scaled.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.expand_dims(halves, range(z.ndim - 1)) - dots
    return _first(jax.lax.argmin(scores, scores.ndim - 1, jnp.int32), codes)


def _first(indices: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the first of the codes that are equal to the one chosen.

    A matrix product may round one column otherwise than an equal one, by its place.
    """
    weights = 1 / (jax.lax.iota(codes.dtype, codes.shape[1]) + math.sqrt(2))
    marks = jnp.sum(codes * weights[None], -1)  # equal rows have equal ones
    of_all = jnp.expand_dims(marks, range(indices.ndim))
    of_chosen = jnp.expand_dims(_rows(marks, indices), -1)
    chosen = jnp.expand_dims(indices, -1)
    shape = (*indices.shape, len(codes))
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, indices.ndim)
    alike = jnp.min(jnp.where(of_all == of_chosen, rows, chosen), -1)
    equal = jnp.all(_rows(codes, alike) == _rows(codes, indices), -1)
    return jnp.where(equal, alike, indices)


def _rows(values: jax.Array, indices: jax.Array) -> jax.Array:
    # An index is in bounds and not negative: no instructions to make it so.
    return values.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _middle(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the median of a few codes, entry by entry, and a size: a power of 2.

    Any point would do that is near the codes. The mean is not, where one code has run
    away to 1e6: it takes the mean along, and all others are confused.
    """
    some = codes[:: -(-len(codes) // _FEW)]
    rank = len(some) // 2
    middle = jnp.sort(some, 0)[(len(some) - 1) // 2]  # nan is sorted last
    middle = jnp.where(jnp.isfinite(middle), middle, jnp.zeros_like(middle))
    size = jnp.sort(jnp.max(jnp.abs(some - middle[None]), -1))[rank]
    # Of a power of 2 the quotient is exact, and so equal distances stay equal.
    size = jax.lax.reduce_precision(size, jnp.finfo(size.dtype).nexp, 0)
    known = jnp.isfinite(size) & (size > 0)
    return middle, jnp.where(known, size, jnp.ones_like(size))


_FEW = 15


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
        raise wrong(ValueError, called, expected, type_of(codes), instead)
    return codes
