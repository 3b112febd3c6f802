"""Quantizers: coarse values forward, a useful gradient backward.

Each is exact forward: the value is the quantizer's own, not almost. What comes back is
biased by nature, since the true derivative of a staircase is zero; each docstring says
what it is instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stopgrad_jax._edge import public
from stopgrad_jax.substitution import replace_value

from ._codebook import VectorQuantized as VectorQuantized
from ._codebook import vector_quantize as vector_quantize
from ._fake import fake_quant as fake_quant
from ._fake import fake_quant_affine as fake_quant_affine
from ._grid import bsq as bsq
from ._grid import fsq as fsq
from ._grid import lfq as lfq
from ._inputs import parameter, per_entry, real, require
from ._learned_step import lsq as lsq
from ._learned_step import lsq_init as lsq_init

__all__ = [
    "VectorQuantized",
    "bsq",
    "ceil",
    "clip",
    "fake_quant",
    "fake_quant_affine",
    "floor",
    "fsq",
    "lfq",
    "lsq",
    "lsq_init",
    "round",
    "trunc",
    "vector_quantize",
]


@public
def round(x: jax.typing.ArrayLike) -> jax.Array:
    """Round to the nearest whole number, half to even.

    Forward: `jnp.round(x)`.
    Backward: the cotangent itself; both modes and every order. Biased: the
    derivative of x, which the value follows to within 1/2. Plain JAX gives 0.

    Args:
      x: a floating array.

    Returns:
      An array of x's shape and dtype; nan and inf where x is.

    Raises:
      TypeError: x is no floating array.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(sg.quantize.round(2.5), jax.grad(sg.quantize.round)(2.5))
        2.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    x = real(x, "x", "round(x)")
    return replace_value(x, jnp.round(x))


@public
def floor(x: jax.typing.ArrayLike) -> jax.Array:
    """Round down.

    Forward: `jnp.floor(x)`.
    Backward: the cotangent itself; both modes and every order. Biased: the
    derivative of x, above which the value never is. Plain JAX gives 0.

    Args:
      x: a floating array.

    Returns:
      An array of x's shape and dtype; nan and inf where x is.

    Raises:
      TypeError: x is no floating array.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(sg.quantize.floor(-2.5), jax.grad(sg.quantize.floor)(-2.5))
        -3.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), as `round`.
    """
    x = real(x, "x", "floor(x)")
    return replace_value(x, jnp.floor(x))


@public
def ceil(x: jax.typing.ArrayLike) -> jax.Array:
    """Round up.

    Forward: `jnp.ceil(x)`.
    Backward: the cotangent itself; both modes and every order. Biased: the
    derivative of x, below which the value never is. Plain JAX gives 0.

    Args:
      x: a floating array.

    Returns:
      An array of x's shape and dtype; nan and inf where x is.

    Raises:
      TypeError: x is no floating array.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(sg.quantize.ceil(-2.5), jax.grad(sg.quantize.ceil)(-2.5))
        -2.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), as `round`.
    """
    x = real(x, "x", "ceil(x)")
    return replace_value(x, jnp.ceil(x))


@public
def trunc(x: jax.typing.ArrayLike) -> jax.Array:
    """Round toward zero.

    Forward: `jnp.trunc(x)`.
    Backward: the cotangent itself; both modes and every order. Biased: the
    derivative of x, which the value follows to within 1. Plain JAX gives 0.

    Args:
      x: a floating array.

    Returns:
      An array of x's shape and dtype; nan and inf where x is.

    Raises:
      TypeError: x is no floating array.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(sg.quantize.trunc(-2.5), jax.grad(sg.quantize.trunc)(-2.5))
        -2.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), as `round`.
    """
    x = real(x, "x", "trunc(x)")
    return replace_value(x, jnp.trunc(x))


@public
def clip(
    x: jax.typing.ArrayLike, lo: jax.typing.ArrayLike, hi: jax.typing.ArrayLike
) -> jax.Array:
    """Clip to a range, and let what has left it come back.

    `jnp.clip` has no gradient outside: a weight that has left stays where it is.

    Forward: `jnp.clip(x, lo, hi)`.
    Backward: the cotangent itself, inside and outside; nothing to lo and hi. Both modes
    and every order. Biased outside, where the true derivative is 0.

    Args:
      x: a floating array.
      lo: a number or an array that broadcasts to x; it is cast to x's dtype and may be
        traced.
      hi: likewise.

    Returns:
      An array of x's shape and dtype; nan where x is nan.

    Raises:
      TypeError: x is no floating array, or a bound no real number.
      ValueError: lo is not below hi (where both are known), or does not broadcast.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.quantize.clip(x, -1.0, 1.0)
        >>> print(f(3.0), jax.grad(f)(3.0))
        1.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), as `round`.
    """
    called = "clip(x, lo, hi)"
    x = real(x, "x", called)
    require(
        lambda lo, hi: ~(lo >= hi),
        called,
        "lo is below hi",
        "lo={}, hi={}",
        "clip(x, -1.0, 1.0)",
        lo,
        hi,
    )
    low, high = parameter(lo, x, "lo", called), parameter(hi, x, "hi", called)
    return replace_value(x, jnp.clip(x, per_entry(low, x), per_entry(high, x)))


def __dir__() -> list[str]:
    return __all__
