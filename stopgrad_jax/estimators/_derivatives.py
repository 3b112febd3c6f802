"""Smooth derivatives: what `spike` and `sign` multiply their cotangent by.

Each function here makes one: a function of x (a float array) with a result like it.
They compute in float32 at least, are finite for every x but nan, 0 at infinity where
they decay, and nan at nan. A slope or width may be traced, or an array that broadcasts
to x; it is checked where its value is known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._edge import public
from stopgrad_jax._errors import wrong

__all__ = [
    "Derivative",
    "atan",
    "exponential",
    "fast_sigmoid",
    "gaussian",
    "in_float32",
    "multi_gaussian",
    "require_positive",
    "sigmoid",
]

Derivative = Callable[[Any], jax.Array]


@public
def fast_sigmoid(slope: Any = 25.0) -> Derivative:
    """Make the derivative of a fast sigmoid: a peak of 1 with heavy tails.

    Presets: 25 in snntorch and spyx; 1 in norse (whatever its alpha) and spikingjelly.

    Forward: that of `spike` or `sign`.
    Backward: cotangent / (slope * |x| + 1)**2. Its area is 2 / slope: the steeper, the
    less gradient in all.

    Args:
      slope: how steep, positive.

    Returns:
      A function of x.

    Raises:
      ValueError: slope is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.fast_sigmoid(1.0))
        >>> print(f(1.0), jax.grad(f)(1.0))
        1.0 0.25

    Reference:
      Zenke and Ganguli (2018), "SuperSpike: Supervised Learning in Multilayer Spiking
      Neural Networks".
    """
    require_positive("fast_sigmoid", slope=slope)
    # A power, not a quotient: its own derivative is finite where the square overflows.
    return in_float32(lambda x: (slope * jnp.abs(x) + 1) ** -2)


@public
def sigmoid(slope: Any = 25.0, peak: Any = None) -> Derivative:
    """Make the derivative of a logistic sigmoid.

    It is the true derivative of the mean, if x has logistic noise of scale 1 / slope.
    Finite where exp overflows, as the quotient of exponentials is not.

    Presets: 25 in snntorch, whose peak is 6.25; 4 in spikingjelly.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * slope * s(slope * x) * s(-slope * x), s the logistic sigmoid;
    scaled to `peak`, if that is given. Its area is 1 without, and it tends to a delta.

    Args:
      slope: how steep, positive.
      peak: value at 0; slope / 4 if not given.

    Returns:
      A function of x.

    Raises:
      ValueError: slope is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.sigmoid(25.0))
        >>> print(jax.grad(f)(0.0), jax.grad(f)(-8.0))
        6.25 0.0

    Reference:
      Zenke and Ganguli (2018), "SuperSpike: Supervised Learning in Multilayer Spiking
      Neural Networks".
    """
    require_positive("sigmoid", slope=slope)
    height = slope if peak is None else 4 * peak

    def derivative(x: jax.Array) -> jax.Array:
        return height * jax.nn.sigmoid(slope * x) * jax.nn.sigmoid(-slope * x)

    return in_float32(derivative)


@public
def atan(alpha: Any = 2.0) -> Derivative:
    """Make the derivative of an arc tangent.

    Presets: 2 in snntorch and spikingjelly. spyx's `arctan(2)` is this one with alpha
    4, divided by 2 pi.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * (alpha / 2) / (1 + (pi / 2 * alpha * x)**2). Its area is 1,
    and it tends to a delta.

    Args:
      alpha: how steep, positive; the peak is alpha / 2.

    Returns:
      A function of x.

    Raises:
      ValueError: alpha is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.atan())
        >>> print(jax.grad(f)(0.0), f"{jax.grad(f)(1.0):.4f}")
        1.0 0.0920

    Reference:
      Fang et al. (2021), "Incorporating Learnable Membrane Time Constants to Enhance
      Learning of Spiking Neural Networks".
    """
    require_positive("atan", alpha=alpha)

    def derivative(x: jax.Array) -> jax.Array:
        return alpha / 2 * (1 + (math.pi / 2 * alpha * x) ** 2) ** -1

    return in_float32(derivative)


@public
def gaussian(std: Any = 1.0, peak: Any = None) -> Derivative:
    """Make a normal density.

    It is the true derivative of the mean, if x has normal noise of that deviation.

    Presets: std 1 / (sqrt(2) alpha) is spikingjelly's `Erf`; std 1 / (sqrt(2) k) with
    peak 2 / sqrt(pi) is norse's `heavi_erfc`.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * exp(-(x / std)**2 / 2) / (std * sqrt(2 pi)); scaled to `peak`,
    if that is given. Its area is 1 without, and it tends to a delta.

    Args:
      std: standard deviation, positive.
      peak: value at 0; that of the density if not given.

    Returns:
      A function of x.

    Raises:
      ValueError: std is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.gaussian())
        >>> print(f"{jax.grad(f)(0.0):.4f} {jax.grad(f)(1.0):.4f}")
        0.3989 0.2420

    Reference:
      Yin, Corradi and Bohte (2021), "Accurate and Efficient Time-Domain Classification
      with Adaptive Spiking Recurrent Neural Networks".
    """
    require_positive("gaussian", std=std)
    if peak is None:
        return in_float32(lambda x: _density(x, 0.0, std))
    return in_float32(lambda x: peak * jnp.exp(-0.5 * (x / std) ** 2))


@public
def multi_gaussian(std: Any = 0.5, height: Any = 0.15, scale: Any = 0.5) -> Derivative:
    """Make a normal density with a negative one on either side.

    Presets: the defaults are those of the authors' own programs.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * scale * ((1 + h) N(0, s) - h N(s, 6 s) - h N(-s, 6 s)), the
    densities at x, h the height and s the deviation. Its area is scale * (1 - h).

    Args:
      std: standard deviation of the middle, positive.
      height: part of the sides.
      scale: factor of all.

    Returns:
      A function of x.

    Raises:
      ValueError: std is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.multi_gaussian())
        >>> print(f"{jax.grad(f)(0.0):.4f} {jax.grad(f)(2.0):.4f}")
        0.4391 -0.0157

    Reference:
      Yin, Corradi and Bohte (2021), "Accurate and Efficient Time-Domain Classification
      with Adaptive Spiking Recurrent Neural Networks".
    """
    require_positive("multi_gaussian", std=std)

    def derivative(x: jax.Array) -> jax.Array:
        sides = _density(x, std, 6 * std) + _density(x, -std, 6 * std)
        return scale * ((1 + height) * _density(x, 0.0, std) - height * sides)

    return in_float32(derivative)


@public
def exponential(width: Any = 1.0, scale: Any = 1.0) -> Derivative:
    """Make an exponential that decays on both sides.

    Presets: width and scale are lava-dl's tau_rho and scale_rho; the defaults are
    spikingjelly's `PiecewiseExp`, whose alpha is 1 / width.

    Forward: that of `spike` or `sign`.
    Backward: cotangent * scale / (2 * width) * exp(-|x| / width). Its area is scale.

    Args:
      width: where it has fallen to 1 / e, positive.
      scale: factor of all.

    Returns:
      A function of x.

    Raises:
      ValueError: width is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.spike(x, sg.surrogate.exponential())
        >>> print(jax.grad(f)(0.0), f"{jax.grad(f)(1.0):.4f}")
        0.5 0.1839

    Reference:
      Shrestha and Orchard (2018), "SLAYER: Spike Layer Error Reassignment in Time".
    """
    require_positive("exponential", width=width)
    return in_float32(lambda x: scale / (2 * width) * jnp.exp(-jnp.abs(x) / width))


# What they are made of --------------------------------------------------------------


def in_float32(derivative: Callable[[jax.Array], jax.Array]) -> Derivative:
    """Compute in float32 at least; hand back the dtype of x."""

    @functools.wraps(derivative)
    def wide(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        narrow = x.dtype.itemsize < 4
        return derivative(x.astype("float32") if narrow else x).astype(x.dtype)

    return wide


def require_positive(factory: str, **parameters: Any) -> None:
    """Refuse a parameter that is not positive, where its value is known."""
    for name, value in parameters.items():
        if _jax.is_traced(value):
            continue
        if not np.all(np.asarray(value) > 0):
            raise wrong(
                ValueError,
                f"{factory}({name})",
                f"{name} is positive",
                f"{value}",
                f"sg.surrogate.{factory}({name}=1.0)",
            )


def _density(x: jax.Array, mean: Any, std: Any) -> jax.Array:
    return jnp.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
