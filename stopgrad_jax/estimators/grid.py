"""Quantize vectors to codebooks that need no learning: a grid, or the signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stopgrad_jax._errors import beats, type_of
from stopgrad_jax.gates import stop_gradient
from stopgrad_jax.substitution import replace_value

from .inputs import UNBOUNDED, real, whole, wide

__all__ = ["bsq", "direction", "dot", "fsq", "lfq"]


def fsq(
    z: jax.typing.ArrayLike,
    levels: Sequence[int],
    *,
    variant: Literal["paper", "lucidrains"] = "paper",
) -> jax.Array:
    """Round each entry of a code to a few levels: a codebook that is a grid.

    Entry i is bounded to `levels[i]` whole numbers, rounded, and divided by
    `levels[i] // 2`, so that the code lies in [-1, 1]. With `h = (levels - 1) / 2`, an
    offset of 1/2 for an even number of levels and 0 for an odd one, the bound is

        paper:       tanh(z + tan(offset / h')) * h' - offset,    h' = h * (1 - 0.001)
        lucidrains:  tanh(z + atanh(offset / h')) * h' - offset,  h' = h * (1 + 0.001)

    The first is of the paper's own code, the second of vector-quantize-pytorch. They
    give different codes for the same z.

    Forward: `round(bound(z)) / (levels // 2)`, half to even; in float32 at least.
    Backward: that of `bound(z) / (levels // 2)`, both modes and every order. Biased;
    the limit of many levels is the bound itself.

    Args:
      z: a floating array; its last axis is the code.
      levels: the number of levels of each entry, 2 or more; (8, 5, 5, 5) makes 1,000
        codes.
      variant: "paper" or "lucidrains".

    Returns:
      An array of z's shape and dtype; nan where z is nan.

    Raises:
      TypeError: z is no floating array.
      ValueError: z is a scalar, levels are not as many as the code has entries, one is
        below 2, or the variant is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda z: sg.quantize.fsq(z, (3, 5))
        >>> z = jnp.array([0.0, 0.4])
        >>> print(f(z), jax.grad(lambda z: f(z)[0])(z))
        [0.  0.5] [0.999 0.   ]

    Reference:
      Mentzer et al. (2023), "Finite Scalar Quantization: VQ-VAE Made Simple".
    """
    called = f"fsq(z, {levels!r:.40}, variant={variant!r})"
    z = real(z, "z", called, rank=1)
    counts = np.asarray(_levels(levels, z, called), np.float64)
    bounded = wide(z)
    offset = np.where(counts % 2 == 0, 0.5, 0.0)
    if variant == "paper":
        half = (counts - 1) * (1 - 1e-3) / 2
        shift = np.tan(offset / half)
    elif variant == "lucidrains":
        half = (counts - 1) * (1 + 1e-3) / 2
        shift = np.arctanh(offset / half)
    else:
        expected = 'variant is "paper" or "lucidrains"'
        raise ValueError(beats(called, expected, f"{variant!r}", 'variant="paper"'))
    shift, half, offset, width = (
        jnp.broadcast_to(jnp.asarray(v, bounded.dtype), z.shape)
        for v in (shift, half, offset, counts // 2)
    )
    bounded = jnp.tanh(bounded + shift) * half - offset
    code = jnp.round(stop_gradient(bounded))
    return (replace_value(bounded, code) / width).astype(z.dtype)


def lfq(z: jax.typing.ArrayLike) -> jax.Array:
    """Take the sign of each entry: a codebook of all corners of a cube.

    Forward: 1 where z is above 0, -1 elsewhere, at 0 too.
    Backward: the cotangent itself; both modes. Biased, and not clipped: the paper adds
    an entropy loss, which keeps z near.

    Args:
      z: a floating array.

    Returns:
      An array of z's shape and dtype; nan where z is nan.

    Raises:
      TypeError: z is no floating array.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> z = jnp.array([-0.3, 0.0, 2.0])
        >>> print(sg.quantize.lfq(z))
        [-1. -1.  1.]
        >>> print(jax.grad(lambda z: sg.quantize.lfq(z).sum())(z))
        [1. 1. 1.]

    Reference:
      Yu et al. (2024), "Language Model Beats Diffusion: Tokenizer is Key to Visual
      Generation"; so does vector-quantize-pytorch.
    """
    z = real(z, "z", "lfq(z)")
    return replace_value(z, _sign(z))


def bsq(z: jax.typing.ArrayLike) -> jax.Array:
    """Project a code to the unit sphere and take the nearest corner of a cube in it.

    Forward: `sign(z) / sqrt(d)` for a code of d entries, sign(0) = -1.
    Backward: that of `z / norm(z)`, both modes and every order: what would only make z
    longer is taken out. At z = 0, which has no direction, the cotangent itself.

    Biased, but less than `lfq`: value and point on the sphere are at most
    `sqrt(2 - 2 / sqrt(d))` apart.

    Args:
      z: a floating array; its last axis is the code.

    Returns:
      An array of z's shape and dtype, of norm 1; nan where z is nan.

    Raises:
      TypeError: z is no floating array.
      ValueError: z is a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> z = jnp.array([3.0, -4.0])
        >>> print(sg.quantize.bsq(z))
        [ 0.70710677 -0.70710677]
        >>> print(jax.grad(lambda z: sg.quantize.bsq(z)[0])(z))
        [0.128 0.096]

    Reference:
      Zhao, Xiong and Krähenbühl (2024), "Image and Video Tokenization with Binary
      Spherical Quantization".
    """
    z = real(z, "z", "bsq(z)", rank=1)
    given = wide(z)
    corner = _sign(given) * (1 / np.sqrt(z.shape[-1]).item())
    return replace_value(direction(given)[0], corner).astype(z.dtype)


def direction(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return z / norm(z), z where that is 0, and the norm; of numbers of any size."""
    largest = stop_gradient(jnp.max(jnp.abs(z), -1, keepdims=True))
    zero = largest == 0
    largest = jnp.where(zero, jnp.ones_like(largest), largest)
    scaled = z / largest
    square = dot(scaled, scaled)
    norm = jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square))
    return scaled / norm, jnp.where(zero, jnp.zeros_like(norm), largest * norm)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the dot products over the last axis, which is kept."""
    return jnp.sum(a * b, -1, keepdims=True)


def _sign(z: jax.Array) -> jax.Array:
    """Return the sign, -1 at 0 and nan at nan."""
    return jnp.where(z == 0, -jnp.ones_like(z), jnp.sign(z))


def _levels(levels: Any, z: jax.Array, called: str) -> list[int]:
    counts = list(levels) if isinstance(levels, Sequence | np.ndarray) else [levels]
    width = z.shape[-1]
    if len(counts) != width:
        raise ValueError(
            beats(
                called,
                f"levels has {width} entries, as many as the last axis of z",
                f"{len(counts)} levels and z of {type_of(z)}",
                f"levels={(8, *(5,) * (width - 1))[:width]}",
            )
        )
    return [
        whole(n, f"levels[{k}]", called, 2, UNBOUNDED) for k, n in enumerate(counts)
    ]
