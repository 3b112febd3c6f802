"""Derivatives made for signs; those whose edges matter say what happens there.

No two of `jnp.clip`, `lax.clamp` and `jax.nn.hard_tanh` agree about the derivative at
1, so the mask is built here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stopgrad_jax._edge import public

from ._derivatives import Derivative, in_float32, require_positive
from ._piecewise import triangle, where_inside

__all__ = ["approx_sign", "hard_tanh", "identity", "swish_sign"]


@public
def identity() -> Derivative:
    """Make 1, the derivative of the identity: the plain straight-through estimator.

    Presets: snntorch's `straight_through_estimator`; larq's `ste_sign` with no clip.

    Forward: that of `spike` or `sign`.
    Backward: the cotangent, also at nan and inf.

    Returns:
      A function of x.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.sign(x, sg.surrogate.identity())
        >>> print(f(-3.0), jax.grad(f)(-3.0))
        -1.0 1.0

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    return jnp.ones_like


@public
def hard_tanh(closed: bool = True) -> Derivative:
    """Make 1 from -1 to 1, 0 outside: the derivative of clip(x, -1, 1).

    Presets: closed is larq's `ste_sign` and `ste_heaviside`, and the paper.

    Forward: that of `spike` or `sign`.
    Backward: the cotangent where |x| <= 1 (|x| < 1, if not closed), else 0. Its area
    is 2, the jump of a sign.

    Args:
      closed: whether -1 and 1 themselves pass it.

    Returns:
      A function of x.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.sign(x, sg.surrogate.hard_tanh())
        >>> g = lambda x: sg.surrogate.sign(x, sg.surrogate.hard_tanh(closed=False))
        >>> print(jax.grad(f)(1.0), jax.grad(g)(1.0), jax.grad(f)(1.1))
        1.0 0.0 0.0

    Reference:
      Courbariaux et al. (2016), "Binarized Neural Networks".
    """
    if closed:
        return lambda x: where_inside(jnp.abs(x) <= 1, 1, jnp.asarray(x))
    return lambda x: where_inside(jnp.abs(x) < 1, 1, jnp.asarray(x))


@public
def approx_sign() -> Derivative:
    """Make 2 * (1 - |x|) from -1 to 1, the derivative of two parabolas.

    Presets: larq's `approx_sign`. It is `triangle(width=1, peak=2)` under the name it
    has for signs.

    Forward: that of `sign`; of `spike` with `triangle()`.
    Backward: cotangent * max(0, 2 - 2 * |x|). Its area is 2, the jump of a sign.

    Returns:
      A function of x.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.sign(x, sg.surrogate.approx_sign())
        >>> print(jax.grad(f)(0.0), jax.grad(f)(-0.75), jax.grad(f)(1.0))
        2.0 0.5 0.0

    Reference:
      Liu et al. (2018), "Bi-Real Net: Enhancing the Performance of 1-bit CNNs with
      Improved Representational Capability and Advanced Training Algorithm".
    """
    return triangle(width=1.0, peak=2.0)


@public
def swish_sign(beta: Any = 5.0) -> Derivative:
    """Make the derivative of the sign-swish function, which overshoots on both sides.

    Finite where `beta * x` overflows, as the published quotient is not. 5 in larq.

    Forward: that of `sign`; of `spike` with half of it.
    Backward: cotangent * beta * (2 - z * tanh(z / 2)) / (1 + cosh(z)), z = beta * x.
    Its area is 2, and it tends to a delta.

    Args:
      beta: how steep, positive; the peak is beta.

    Returns:
      A function of x.

    Raises:
      ValueError: beta is not positive.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.surrogate.sign(x, sg.surrogate.swish_sign())
        >>> print(jax.grad(f)(0.0), f"{jax.grad(f)(1.0):.4f}")
        5.0 -0.1950

    Reference:
      Darabi et al. (2018), "BNN+: Improved Binary Network Training".
    """
    require_positive("swish_sign", beta=beta)

    def derivative(x: jax.Array) -> jax.Array:
        # 1 / (1 + cosh z) is 2 s(z) s(-z), long 0 at 1e6: inf would make 0 * inf of it.
        z = jnp.minimum(jnp.abs(beta * x), 1e6)
        tails = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
        return 2 * beta * (2 - z * jnp.tanh(z / 2)) * tails

    return in_float32(derivative)
