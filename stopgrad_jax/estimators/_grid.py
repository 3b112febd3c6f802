"""Quantize vectors to codebooks that need no learning: a grid, or the signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stopgrad_jax._checks import option, whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.gates import stop_gradient
from stopgrad_jax.substitution import replace_value

from ._inputs import real, wide, wider

__all__ = ["bsq", "direction", "dot", "fsq", "lfq"]


@public
def fsq(
    z: jax.typing.ArrayLike,
    levels: Sequence[int],
    *,
    variant: Literal["paper", "lucidrains", "symmetric"] = "paper",
) -> jax.Array:
    """Round each entry of a code to a few levels: a codebook that is a grid.

    Entry i is bounded, rounded to one of `levels[i]` numbers and divided, so that the
    code lies in [-1, 1]. With `h = (levels - 1) / 2`, an offset of 1/2 for an even
    number of levels and 0 for an odd one, the bound is

        paper:       tanh(z + tan(offset / h')) * h' - offset,    h' = h * (1 - 0.001)
        lucidrains:  tanh(z + atanh(offset / h')) * h' - offset,  h' = h * (1 + 0.001)
        symmetric:   tanh(z) * h

    The first is of the paper's own code, the second of vector-quantize-pytorch, the
    third that package's `preserve_symmetry`. They give different codes for the same z.
    The first two round to whole numbers, which are divided by `levels // 2`: an even
    number of levels reaches from -1 to less than 1. The third has evenly spaced numbers
    from -h to h, divided by h.

    Two levels need "symmetric". The others shift even levels off the middle: for a
    standard normal z, 2 levels are one code in 94.1 percent of cases ("paper") or
    99.993 ("lucidrains", where that package refuses them), and two halves in
    "symmetric"; codes of 4 levels have 12 to 33 percent, and 21 to 29. Of 3 levels and
    more none has over 1.7 / levels.

    Forward: the number nearest to the bound; of two equally near ones the even one, or
    in "symmetric" the greater. In float32 at least.
    Backward: that of the bound, divided likewise; both modes and every order. Nothing
    is clipped, but nothing comes back from where tanh rounds to 1 or -1. Biased; value
    and divided bound are at most `1 / (levels - 1)` apart.

    Args:
      z: a floating array; its last axis is the code.
      levels: the number of levels of each entry, 2 or more; (8, 5, 5, 5) makes 1,000
        codes. The page of `quantize` has the line that makes indices of them.
      variant: "paper", "lucidrains" or "symmetric".

    Returns:
      An array of z's shape and dtype; nan where z is nan.

    Raises:
      TypeError: z is no floating array.
      ValueError: z is a scalar or its last axis empty, levels are not as many as the
        code has entries, one is below 2 or, but for "symmetric", above 1,000 (the
        others then have fewer or more than that many), two levels are one number in z's
        dtype (as of 600 in bfloat16), or the variant is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda z: sg.quantize.fsq(z, (3, 5))
        >>> z = jnp.array([0.0, 0.4])
        >>> print(f(z), jax.grad(lambda z: f(z)[0])(z))
        [0.  0.5] [0.999 0.   ]
        >>> print(sg.quantize.fsq(jnp.array([-0.1, 0.1]), (2, 2), variant="symmetric"))
        [-1.  1.]

    Reference:
      Mentzer et al. (2023), "Finite Scalar Quantization: VQ-VAE Made Simple"; Parker et
      al. (2024), "Scaling Transformers for Low-Bitrate High-Quality Speech Coding", for
      the symmetric variant.
    """
    called = f"fsq(z, {levels!r:.40}, variant={variant!r})"
    z = real(z, "z", called, rank=1)
    counts = np.asarray(_levels(levels, z, called), np.float64)
    option(variant, "variant", ("paper", "lucidrains", "symmetric"), called)
    _require_distinct(counts, variant, z, called)
    bounded = wide(z)
    half, offset = (counts - 1) / 2, np.where(counts % 2 == 0, 0.5, 0.0)
    shift, width = 0 * half, counts // 2
    if variant == "paper":
        half = half * (1 - 1e-3)
        shift = np.tan(offset / half)
    elif variant == "lucidrains":
        half = half * (1 + 1e-3)
        shift = np.arctanh(offset / half)
    else:
        width = half
    shift, half, offset, width = (
        jnp.broadcast_to(jnp.asarray(v, bounded.dtype), z.shape)
        for v in (shift, half, offset, width)
    )
    if variant == "symmetric":
        bounded = jnp.tanh(bounded) * half
        # Not round(bounded - offset): for 2 levels that is 1 at -1e-9.
        code = jnp.floor(stop_gradient(bounded) + (0.5 - offset)) + offset
    else:
        bounded = jnp.tanh(bounded + shift) * half - offset
        code = jnp.round(stop_gradient(bounded))
    return (replace_value(bounded, code) / width).astype(z.dtype)


@public
def lfq(z: jax.typing.ArrayLike) -> jax.Array:
    """Take the sign of each entry: a codebook of all corners of a cube.

    Forward: 1 where z is above 0, -1 elsewhere, at 0 too.
    Backward: the cotangent itself; both modes. Biased, and not clipped: nothing here
    keeps z near its sign, or two codes from being the same.

    There are no indices; the page of `quantize` has the line that makes them.

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


@public
def bsq(z: jax.typing.ArrayLike) -> jax.Array:
    """Project a code to the unit sphere and take the nearest corner of a cube in it.

    Forward: `sign(z) / sqrt(d)` for a code of d entries, sign(0) = -1.
    Backward: that of `z / norm(z)`, both modes and every order: what would only make z
    longer is taken out. At z = 0, which has no direction, the cotangent itself.

    Biased: value and point on the sphere are at most `sqrt(2 - 2 / sqrt(d))` apart.

    There are no indices; the page of `quantize` has the line that makes them.

    Args:
      z: a floating array; its last axis is the code.

    Returns:
      An array of z's shape and dtype, of norm 1; nan where z is nan.

    Raises:
      TypeError: z is no floating array.
      ValueError: z is a scalar, or its last axis is empty.

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


def _require_distinct(counts: Any, variant: str, z: jax.Array, called: str) -> None:
    """Refuse more levels than the variant has, or than z's dtype tells apart."""
    most = int(max(counts))
    lost = variant != "symmetric" and most > _MOST
    clash = any(_clash(int(n), variant, z.dtype) for n in set(counts))
    if not lost and not clash:
        return
    expected = f"levels that are different numbers in {z.dtype}"
    if lost:
        expected = f'at most {_MOST} levels, or variant="symmetric"'
    given = "z.astype(jnp.float32)" if clash else "z"
    raise wrong(
        ValueError,
        called,
        expected,
        f"{most} levels, and z of {type_of(z)}",
        f'fsq({given}, levels, variant="{"symmetric" if lost else variant}")',
    )


def _clash(count: int, variant: str, dtype: Any) -> bool:
    """Tell whether two levels are one number in a dtype."""
    digits = jnp.finfo(dtype).nmant
    if dtype == wider(dtype) or count > 2 ** (digits + 3):
        return count > 2 ** (digits + 1)
    width = (count - 1) / 2
    codes = np.arange(count) - width
    if variant != "symmetric":
        codes, width = np.floor(codes), count // 2
    return len(np.unique((codes / width).astype(dtype))) < count


# Beyond it h' is half a level more or less than h.
_MOST = 1000


def _levels(levels: Any, z: jax.Array, called: str) -> list[int]:
    counts = list(levels) if isinstance(levels, Sequence | np.ndarray) else [levels]
    width = z.shape[-1]
    if len(counts) != width:
        raise wrong(
            ValueError,
            called,
            f"levels has {width} entries, as many as the last axis of z",
            f"{len(counts)} levels and z of {type_of(z)}",
            f"levels={(8, *(5,) * (width - 1))[:width]}",
        )
    return [whole(n, f"levels[{k}]", called, 2) for k, n in enumerate(counts)]
