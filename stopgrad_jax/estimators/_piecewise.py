"""Piecewise derivatives: what `spike` and `sign` multiply their cotangent by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stopgrad_jax._edge import public

from ._derivatives import Derivative, in_float32, require_positive

__all__ = ["boxcar", "leaky", "triangle", "where_inside"]


@public
def triangle(width: Any = 1.0, peak: Any = 1.0) -> Derivative:
    """Make a triangle around 0.

    Presets: peak 0.3 in Bellec (2018) and norse; width 1 / k in spyx's `triangular(k)`.
    snntorch's `triangular` is another function: 1 below 0, -1 from there on.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * peak * max(0, 1 - |x| / width). Its area is peak * width.

    Args:
      width: where it comes to 0, positive.
      peak: value at 0.

    Returns:
      A function of x.

    Raises:
      ValueError: width is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.triangle(peak=0.5))
        >>> print(jax.grad(f)(0.5), jax.grad(f)(2.0))
        0.25 0.0

    Reference:
      Esser et al. (2016), "Convolutional Networks for Fast, Energy-Efficient
      Neuromorphic Computing"; Bellec et al. (2018), "Long Short-Term Memory and
      Learning-to-Learn in Networks of Spiking Neurons".
    """
    require_positive("triangle", width=width)
    return in_float32(lambda x: peak * jax.nn.relu(1 - jnp.abs(x) / width))


@public
def boxcar(width: Any = 2.0, height: Any = 0.5) -> Derivative:
    """Make a box around 0.

    Presets: 2 and 0.5 in spyx; width a and height 1 / a in Wu (2018).

    Forward: that of `spike` or `sign`.
    Backward: cotangent * height where |x| < width / 2, else 0: 0 on the edge itself.
    Its area is width * height.

    Args:
      width: from edge to edge, positive.
      height: value inside.

    Returns:
      A function of x.

    Raises:
      ValueError: width is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.boxcar())
        >>> print(jax.grad(f)(0.9), jax.grad(f)(1.0))
        0.5 0.0

    Reference:
      Wu et al. (2018), "Spatio-Temporal Backpropagation for Training High-Performance
      Spiking Neural Networks".
    """
    require_positive("boxcar", width=width)
    return in_float32(lambda x: where_inside(jnp.abs(x) < width / 2, height, x))


@public
def leaky(slope: Any = 0.1, peak: Any = 1.0) -> Derivative:
    """Make the derivative of a leaky rectifier.

    Presets: 0.1 is snntorch's `LSO`, which has the slope at 0 too; slope 0 and peak 1
    is spikingjelly's `LeakyKReLU`.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * peak where x >= 0, cotangent * slope where x < 0.

    Args:
      slope: value below 0.
      peak: value from 0 on.

    Returns:
      A function of x.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.leaky())
        >>> print(jax.grad(f)(0.0), jax.grad(f)(-1.0))
        1.0 0.1

    Reference:
      Maas, Hannun and Ng (2013), "Rectifier Nonlinearities Improve Neural Network
      Acoustic Models".
    """
    return in_float32(
        lambda x: jnp.where(x >= 0, peak, jnp.where(x < 0, slope, x)).astype(x.dtype)
    )


def where_inside(inside: jax.Array, height: Any, x: jax.Array) -> jax.Array:
    """Return height inside, 0 outside and nan at nan."""
    return jnp.where(inside, height, jnp.where(jnp.isnan(x), x, 0)).astype(x.dtype)
