"""Steps and signs, with a derivative of your choice.

A step has no useful derivative: it is 0 almost everywhere. Networks of spikes and of
signs put another one in its place, a *surrogate*. That makes a gradient which is biased
and has no variance; how far off it is depends on the surrogate, and nothing bounds it.
A surrogate that is a density (area 1; 2 for a sign) is the true derivative of the mean
of a step whose x has noise of that density, and narrower and narrower ones tend to the
delta that is the step's derivative in the sense of distributions.

`spike` and `sign` are the functions; all others make derivatives to pass to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stopgrad_jax._checks import real_floats
from stopgrad_jax._edge import public
from stopgrad_jax._errors import function_name, type_of, wrong
from stopgrad_jax.gates import scale_gradient
from stopgrad_jax.substitution import replace_value

from ._derivatives import atan as atan
from ._derivatives import exponential as exponential
from ._derivatives import fast_sigmoid as fast_sigmoid
from ._derivatives import gaussian as gaussian
from ._derivatives import multi_gaussian as multi_gaussian
from ._derivatives import sigmoid as sigmoid
from ._piecewise import boxcar as boxcar
from ._piecewise import leaky as leaky
from ._piecewise import triangle as triangle
from ._signs import approx_sign as approx_sign
from ._signs import hard_tanh as hard_tanh
from ._signs import identity as identity
from ._signs import swish_sign as swish_sign

__all__ = [
    "approx_sign",
    "atan",
    "boxcar",
    "exponential",
    "fast_sigmoid",
    "gaussian",
    "hard_tanh",
    "identity",
    "leaky",
    "multi_gaussian",
    "sigmoid",
    "sign",
    "spike",
    "swish_sign",
    "triangle",
]


@public
def spike(
    x: ArrayLike, derivative: Callable[[Any], ArrayLike], *, at_zero: Any = 1.0
) -> jax.Array:
    """Fire where x is positive, and learn by a derivative of your choice.

    x is what is above the threshold: `spike(potential - threshold, ...)`.

    Forward: 1 where x > 0, 0 where x < 0, at_zero where x is 0; nan at nan.
    Backward: cotangent * derivative(x), in both modes. To higher orders `derivative` is
    itself differentiated, as if it were the derivative of what went forward; to end
    there, stop its x.

    Biased, without variance; see the derivative for what it tends to.

    Args:
      x: a float array of any shape.
      derivative: a function of x with a result of its shape and dtype (an int or bool
        result is cast), such as `sigmoid()`. What it closes over may be traced, and has
        no first derivative.
      at_zero: the value where x is 0 (-0 too, and subnormals where the device takes
        them for 0): 1 in spikingjelly and lava-dl, 0 in snntorch, norse, spyx and larq.

    Returns:
      An array like x.

    Raises:
      TypeError: x is no real float, derivative is no function, or its result has
        another dtype.
      ValueError: its result has another shape.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> x = jnp.array([-1.0, 0.0, 0.5])
        >>> fire = lambda x: sg.surrogate.spike(x, sg.surrogate.triangle())
        >>> print(fire(x), jax.grad(lambda x: fire(x).sum())(x))
        [0. 1. 1.] [0.  1.  0.5]

    Reference:
      Neftci, Mostafa and Zenke (2019), "Surrogate Gradient Learning in Spiking Neural
      Networks".
    """
    return _two_valued(x, derivative, 0, at_zero, "spike")


@public
def sign(
    x: ArrayLike, derivative: Callable[[Any], ArrayLike], *, at_zero: Any = 1.0
) -> jax.Array:
    """Take the sign, and learn by a derivative of your choice.

    Forward: 1 where x > 0, -1 where x < 0, at_zero where x is 0; nan at nan.
    Backward: cotangent * derivative(x), in both modes. To higher orders `derivative` is
    itself differentiated, as if it were the derivative of what went forward; to end
    there, stop its x.

    Biased, without variance; see the derivative for what it tends to.

    Args:
      x: a float array of any shape.
      derivative: as for `spike`; for binary networks `hard_tanh()`, `approx_sign()` or
        `swish_sign()`.
      at_zero: the value where x is 0 (-0 too): 1 in larq, so that there are two values
        only; 0 is `jnp.sign`.

    Returns:
      An array like x.

    Raises:
      TypeError, ValueError: as `spike`.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> x = jnp.array([-2.0, 0.0, 0.5])
        >>> binary = lambda x: sg.surrogate.sign(x, sg.surrogate.hard_tanh())
        >>> print(binary(x), jax.grad(lambda x: binary(x).sum())(x))
        [-1.  1.  1.] [0. 1. 1.]

    Reference:
      Courbariaux et al. (2016), "Binarized Neural Networks".
    """
    return _two_valued(x, derivative, -1, at_zero, "sign")


def _two_valued(x: Any, derivative: Any, low: int, at_zero: Any, name: str) -> Any:
    called = f"{name}(x, {function_name(derivative)})"
    x = real_floats(x, "x", called)
    slopes = _slopes(derivative, x, called)
    # At a known at_zero that is one of the two values, one comparison less.
    known = at_zero if isinstance(at_zero, int | float) else None
    value = jnp.where(x <= 0 if known == low else x < 0, low, x)
    value = jnp.where(x >= 0 if known == 1 else x > 0, 1, value)
    if known not in (low, 1):
        value = jnp.where(x == 0, jnp.asarray(at_zero, x.dtype), value)
    return replace_value(scale_gradient(x, slopes), value)


def _slopes(derivative: Any, x: jax.Array, called: str) -> jax.Array:
    """Ask a derivative for its slopes at x, or refuse it: one for each entry."""
    slopes = derivative(x) if callable(derivative) else derivative
    if callable(slopes) or not callable(derivative):
        came = "one that returns a function" if callable(slopes) else f"{derivative!r}"
        expected = "derivative is a function of x with a result like x"
        instead = "sg.surrogate.sigmoid(), with the parentheses, or lambda x: ..."
        raise wrong(TypeError, called, expected, came[:60], instead)
    slopes = jnp.asarray(slopes)
    if slopes.shape != x.shape:
        raise wrong(
            ValueError,
            called,
            f"derivative(x) has the shape of x, {type_of(x)}",
            type_of(slopes),
            "a derivative that works entry by entry, or "
            "jnp.broadcast_to(result, x.shape) in it",
        )
    weak = getattr(slopes, "weak_type", False) and not jnp.iscomplexobj(slopes)
    if weak or not jnp.issubdtype(slopes.dtype, jnp.inexact):
        return slopes.astype(x.dtype)
    if slopes.dtype != x.dtype:
        raise wrong(
            TypeError,
            called,
            f"derivative(x) has the dtype of x, {type_of(x)}",
            type_of(slopes),
            "result.astype(x.dtype) in it",
        )
    return slopes


def __dir__() -> list[str]:
    return __all__
