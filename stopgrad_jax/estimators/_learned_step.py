"""Quantize with a step that learns."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from stopgrad_jax._checks import whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.gates import mask_gradient, scale_gradient, stop_gradient
from stopgrad_jax.substitution import replace_value

from ._inputs import (
    codes,
    parameter,
    per_entry,
    real,
    require_positive,
    wide,
)

__all__ = ["lsq", "lsq_init"]


@public
def lsq(
    x: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike,
    qmin: int,
    qmax: int,
    *,
    num_elements: int,
) -> jax.Array:
    """Round to whole multiples of a step that learns.

    Forward: `round(clip(v, qmin, qmax)) * step` with `v = x / step`, half to even; in
    float32 at least.
    Backward: to x the cotangent where `qmin < v < qmax`, ends excluded, as in the
    paper; none at an end and beyond. To step the sum of the cotangent times
    `round(v) - v` there, qmin below and qmax above, over `sqrt(num_elements * qmax)`.
    Both modes.

    Biased in x, as every rounding. The gradient of step is the derivative that remains
    when round has the slope 1, over a root that is the paper's, to balance the updates
    of steps and of weights.

    A step that is computed from x (`abs(x).max() / qmax`) is not for here: the largest
    x lies at the end and gets no gradient. See `fake_quant_affine`.

    Args:
      x: a floating array.
      step: a positive number or an array that broadcasts to x (one per channel);
        `lsq_init` gives a first one. In training nothing keeps it positive but its
        gradient: `jnp.exp` or `jax.nn.softplus` of a free number does.
      qmin: the lowest code, `-2**(bits - 1)` for weights and 0 after a relu.
      qmax: the highest code, above 0.
      num_elements: how many entries share a step: those of a weight array, or the
        features of one example. Never read from x, whose size under `vmap` is that of
        one example.

    Returns:
      An array of x's shape and dtype; nan where x is nan.

    Raises:
      TypeError: x is no floating array, or step no real number.
      ValueError: qmin is not below qmax, qmax not above 0, num_elements below 1, step
        not positive (where it is known), or it does not broadcast.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def f(x, step):
        ...     return sg.quantize.lsq(x, step, -2, 1, num_elements=4).sum()
        >>> x = jnp.array([-2.0, -0.3, 0.3, 2.0])
        >>> print(sg.quantize.lsq(x, 0.5, -2, 1, num_elements=4))
        [-1.  -0.5  0.5  0.5]
        >>> dx, dstep = jax.grad(f, (0, 1))(x, 0.5)
        >>> print(dx, dstep)  # (-2 - 0.4 + 0.4 + 1) / sqrt(4 * 1)
        [0. 1. 1. 0.] -0.5

    Reference:
      Esser et al. (2020), "Learned Step Size Quantization".
    """
    called = f"lsq(x, step, {qmin}, {qmax}, num_elements={num_elements!r:.20})"
    x = real(x, "x", called)
    qmin, qmax = codes(qmin, qmax, called)
    whole(qmax, "qmax", called)
    count = whole(num_elements, "num_elements", called)
    require_positive(step, "step", called)
    given = wide(x)
    step = parameter(step, given, "step", called)
    # One number for all entries, so the root divides once, the sum.
    steps = per_entry(scale_gradient(step, 1 / math.sqrt(count * qmax)), given)

    v = stop_gradient(given) * per_entry(1 / stop_gradient(step), given)
    inside = (v > qmin) & (v < qmax)
    code = jnp.round(jnp.clip(v, qmin, qmax))
    slope = jnp.where(inside, code - v, code)
    source = mask_gradient(given, inside) + scale_gradient(steps, slope)
    return replace_value(source, code * stop_gradient(steps)).astype(x.dtype)


@public
def lsq_init(x: jax.typing.ArrayLike, qmax: int) -> jax.Array:
    """Return the first step for `lsq`, from the weights or a batch of activations.

    Forward: `2 * mean(abs(x)) / sqrt(qmax)`, at least the smallest normal number, so
    that weights which are all 0 have a step to be divided by.
    Backward: an ordinary function of x; a first step is usually not differentiated.

    Args:
      x: a floating array, all that shares the step; `jax.vmap` over channels for one
        per channel.
      qmax: the highest code, above 0.

    Returns:
      A scalar of x's dtype.

    Raises:
      TypeError: x is no floating array.
      ValueError: qmax is below 1, or x has no entry.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> print(sg.quantize.lsq_init(jnp.array([-1.0, 2.0, 3.0]), 4))
        2.0

    Reference:
      Esser et al. (2020), "Learned Step Size Quantization", section 2.1.
    """
    called = f"lsq_init(x, {qmax!r:.20})"
    x = real(x, "x", called)
    if not x.size:
        expected, instead = "x has an entry to take the mean of", "a step of your own"
        raise wrong(ValueError, called, expected, type_of(x), instead)
    root = math.sqrt(whole(qmax, "qmax", called))
    step = (2 / root * jnp.mean(jnp.abs(wide(x)))).astype(x.dtype)
    return jnp.maximum(step, jnp.finfo(x.dtype).tiny)
