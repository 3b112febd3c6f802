"""Quantize to whole multiples of a step and back: fake quantization.

The value is one that the integer arithmetic of a device would give; the gradient is
that of the range's clip, and of its bounds where those learn, or the cotangent itself.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stopgrad_jax._checks import option, whole
from stopgrad_jax._edge import public
from stopgrad_jax.gates import mask_gradient, stop_gradient
from stopgrad_jax.substitution import replace_value

from ._inputs import (
    codes,
    parameter,
    per_entry,
    real,
    require,
    require_positive,
    wide,
)

__all__ = ["fake_quant", "fake_quant_affine"]


@public
def fake_quant(
    x: jax.typing.ArrayLike,
    min: jax.typing.ArrayLike,
    max: jax.typing.ArrayLike,
    num_bits: int = 8,
    narrow_range: bool = False,
) -> jax.Array:
    """Round to the codes of a range whose bounds learn, as TensorFlow does.

    With `qmin = 0` (1 if narrow) and `qmax = 2**num_bits - 1`, the step is
    `s = (max - min) / (qmax - qmin)`. The range is nudged so that 0 is a code: its zero
    point is `z = clip(round(qmin - min / s), qmin, qmax)`, and it reaches from
    `(qmin - z) * s` to `(qmax - z) * s`. So -6 to 6 in 8 bits becomes -6.0235 to
    5.9765, and 2 to 6 becomes 0 to 4.

    Forward: `floor((clip(x) - low) / s + 1/2) * s + low` in the nudged range, so
    written that 0 comes out as 0 exactly; computed in float32 at least.
    Backward: to x the cotangent where x lies in the nudged range, ends included; to min
    the sum of it below, to max above. Both modes.

    Biased, as the gradient of every rounding is: that of x is the clip's, and the value
    is half a step away from the clip at most.

    Nudged, a range may end before its own max, as -6 to 6 does: x = 6 is outside, and
    its cotangent goes to max. Where max is `x.max()` it comes back to x from there; not
    if that is stopped, or a constant. For a gradient everywhere, whatever the range:
    `sg.straight_through(lambda x: sg.quantize.fake_quant(x, low, high))(x)`.

    A symmetric range lies just between two zero points: here the higher one is taken.
    In TensorFlow rounding errors decide, for -6 to 6 as here, for -1 to 1 not.

    Args:
      x: a floating array.
      min: the lower end, a number or an array that broadcasts to x; it may be traced.
      max: the upper end, likewise. Where both are 0 (a range not yet seen) the result
        is 0 and the cotangent passes to x, as in TensorFlow. Where they are equal
        otherwise the result is 0, the limit of closer and closer ends.
      num_bits: 1 to 16; at least 2 if narrow.
      narrow_range: leave out the lowest code, so that -6 to 6 is symmetric.

    Returns:
      An array of x's shape and dtype; nan where x is nan.

    Raises:
      TypeError: x is no floating array, or a bound no real number.
      ValueError: min is not below max (where both are known; equal arrays may be the
        ends of data that are all equal, and pass), a bound does not broadcast, or
        num_bits is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> x = jnp.array([-9.0, 0.0, 0.7, 9.0])
        >>> print(sg.quantize.fake_quant(x, -6.0, 6.0, num_bits=4))
        [-6.4  0.   0.8  5.6]
        >>> f = lambda x, low, high: sg.quantize.fake_quant(x, low, high).sum()
        >>> for g in jax.grad(f, (0, 1, 2))(x, -6.0, 6.0):
        ...     print(g)
        [0. 1. 1. 0.]
        1.0
        1.0

    Reference:
      Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference"; TensorFlow's `fake_quant_with_min_max_vars`.
    """
    called = (
        f"fake_quant(x, min, max, num_bits={num_bits}, narrow_range={narrow_range})"
    )
    x = real(x, "x", called)
    bits = whole(num_bits, "num_bits", called, 2 if narrow_range else 1, 16)
    _require_order(min, max, called)
    qmin, qmax = (1 if narrow_range else 0), 2**bits - 1
    given = wide(x)
    low, high = (
        parameter(min, given, "min", called),
        parameter(max, given, "max", called),
    )
    zero_point, step, divisor = _nudged(*stop_gradient((low, high)), qmin, qmax)
    first, last = (qmin - zero_point) * step, (qmax - zero_point) * step

    start, scale = per_entry(first, given), per_entry(step, given)
    clipped = jnp.clip(stop_gradient(given), start, per_entry(last, given))
    code = jnp.floor((clipped - start) * per_entry(1 / divisor, given) + 0.5)
    value = (code + per_entry(qmin - zero_point, given)) * scale

    infinity = jnp.full_like(step, jnp.inf)
    unset = (low == 0) & (high == 0)
    start = per_entry(jnp.where(unset, -infinity, first), given)
    end = per_entry(jnp.where(unset, infinity, last), given)
    source = mask_gradient(given, (given >= start) & (given <= end))
    source += mask_gradient(per_entry(low, given), given < start)
    source += mask_gradient(per_entry(high, given), given > end)
    return replace_value(source, value).astype(x.dtype)


@public
def fake_quant_affine(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    zero_point: jax.typing.ArrayLike,
    qmin: int,
    qmax: int,
    *,
    gradient: Literal["clipped", "straight_through"] = "clipped",
) -> jax.Array:
    """Round to the codes of a given step and zero point, as PyTorch does.

    Forward: `(clip(round(x * (1 / scale)) + zero_point, qmin, qmax) - zero_point) *
    scale`, half to even; computed in float32 at least.
    Backward: to x the cotangent. "clipped": where the *rounded* code lies from qmin to
    qmax, so half a step further than the range itself, and nothing beyond, as in
    PyTorch. "straight_through": everywhere. Nothing to scale and zero_point, even where
    they are computed from x. Both modes.

    Where the scale is that of x itself, take "straight_through". With `abs(x).max() /
    127.5` and codes of -128 to 127, the largest x lies at 127.5: unless division has
    made it less, it is rounded to 128 and, "clipped", gets no gradient. With
    `abs(x).max() / 127` it is inside.

    Biased, as every rounding; the value is half a step at most from x clipped to
    `(qmin - zero_point) * scale` and `(qmax - zero_point) * scale`.

    Args:
      x: a floating array.
      scale: the step, a number or an array that broadcasts to x (one per channel). It
        is not differentiated: `lsq` has a step that learns.
      zero_point: the code of 0, likewise.
      qmin: the lowest code.
      qmax: the highest code.
      gradient: "clipped" or "straight_through".

    Returns:
      An array of x's shape and dtype; nan where x is nan.

    Raises:
      TypeError: x is no floating array; scale or zero_point no real number.
      ValueError: qmin is not below qmax, scale is not positive or zero_point is no code
        (where they are known), one does not broadcast, or the gradient is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> fake, x = sg.quantize.fake_quant_affine, jnp.array([0.25, 0.75, 3.7, 3.8])
        >>> print(fake(x, 0.5, 0, -8, 7))
        [0.  1.  3.5 3.5]
        >>> for gradient in ("clipped", "straight_through"):
        ...     f = lambda x: fake(x, 0.5, 0, -8, 7, gradient=gradient).sum()
        ...     print(jax.grad(f)(x))
        [1. 1. 1. 0.]
        [1. 1. 1. 1.]

    Reference:
      Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference"; PyTorch's `fake_quantize_per_tensor_affine`.
    """
    called = f"fake_quant_affine(x, scale, zero_point, {qmin}, {qmax})"
    x = real(x, "x", called)
    option(gradient, "gradient", ("clipped", "straight_through"), called)
    qmin, qmax = codes(qmin, qmax, called)
    require_positive(scale, "scale", called)
    require(
        lambda z: (z >= qmin) & (z <= qmax),
        called,
        f"zero_point is a code, {qmin} to {qmax}",
        "zero_point={}",
        f"zero_point={np.clip(0, qmin, qmax)}",
        zero_point,
    )
    given = wide(x)
    step = stop_gradient(parameter(scale, given, "scale", called))
    zero = stop_gradient(parameter(zero_point, given, "zero_point", called))
    zero = per_entry(zero, given)
    code = jnp.round(stop_gradient(given) * per_entry(1 / step, given)) + zero
    value = (jnp.clip(code, qmin, qmax) - zero) * per_entry(step, given)
    if gradient == "clipped":
        given = mask_gradient(given, (code >= qmin) & (code <= qmax))
    return replace_value(given, value).astype(x.dtype)


def _nudged(
    low: jax.Array, high: jax.Array, qmin: int, qmax: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the zero point, the step, and the step to divide by, never 0."""
    shape = jnp.broadcast_shapes(low.shape, high.shape)
    low, high = jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)
    width = high - low
    step = width / (qmax - qmin)
    width, divisor = (jnp.where(v == 0, jnp.ones_like(v), v) for v in (width, step))
    # qmin - low / step, but exact where low is -high, which lies between two codes.
    half = (qmax - qmin) / 2
    zero_point = jnp.clip(qmin + half - half * ((low + high) / width), qmin, qmax)
    # Half up. floor(z + 0.5) is wrong for the number before a half.
    below = jnp.floor(zero_point)
    return jnp.where(zero_point - below >= 0.5, below + 1, below), step, divisor


def _require_order(low: Any, high: Any, called: str) -> None:
    # The ends of data that are all equal are equal, which only arrays can be.
    of_data = isinstance(low, jax.Array) or isinstance(high, jax.Array)
    require(
        lambda a, b: ~(a > b) if of_data else ~(a >= b),
        called,
        "min is below max",
        "min={}, max={}",
        "fake_quant(x, -6.0, 6.0)",
        low,
        high,
    )
