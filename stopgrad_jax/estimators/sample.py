"""Discrete choices with a gradient: what is drawn goes forward, a relaxation back.

Each estimator has two forms: `f(key, logits, ...)` draws; `f_given(draw, logits, ...)`
is the same with the draw given, to replay or to enumerate. Below g is the cotangent of
the sample, p a vector of probabilities and J(p) g = p * (g - <g, p>), the derivative of
a softmax. A choice is made along the last axis; the axes before it are a batch.

Draws and softmaxes are computed in float32 at least: 16-bit noise has too few values,
and its ties favor the first class. A logit of -inf is a class that is never drawn and
gets no gradient. A row has no distribution where its softmax is nan: with a nan or inf
among the logits, or with nothing but -inf. Its sample is nan, and so is its gradient
(`jax.random.categorical` draws class 0 of nothing but -inf). Temperatures are numbers
or arrays that broadcast to the logits; they may be traced, and learn as they do in the
softmax of the backward pass. A traced one that is not above 0 makes nan of what it
divides.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stopgrad_jax._checks import option, real_floats, whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.substitution import replace_value

from . import _draws as draws
from ._gumbel import gumbel_rao, gumbel_rao_given, gumbel_softmax, gumbel_softmax_given

__all__ = [
    "bernoulli",
    "bernoulli_given",
    "categorical",
    "categorical_given",
    "gumbel_rao",
    "gumbel_rao_given",
    "gumbel_softmax",
    "gumbel_softmax_given",
    "reinmax",
    "reinmax_given",
    "top_k_mask",
]

Adjust = Literal["identity", "sigmoid"]


@public
def bernoulli(
    key: jax.Array, logits: ArrayLike, adjust: Adjust = "identity"
) -> jax.Array:
    """Draw zeros and ones; the gradient passes straight through.

    Biased, except under "sigmoid" for functions linear in the sample.

    Forward: 1 with probability sigmoid(logits), else 0; always 1 at inf, 0 at -inf, nan
      at nan.
    Backward: g ("identity"), or g * s * (1 - s) with s = sigmoid(logits) ("sigmoid").

    Args:
      key: a random key.
      logits: floats of any shape.
      adjust: "identity" is Hinton's, "sigmoid" that of Bengio et al. and Chung et al.

    Returns:
      Zeros and ones, of logits' shape and dtype.

    Raises:
      TypeError: logits are not floating.
      ValueError: adjust is neither.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda l: 3 * sg.sample.bernoulli(jax.random.key(0), l, "sigmoid")
        >>> print(f(0.0), jax.grad(f)(0.0))
        0.0 0.75

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    called = "bernoulli(key, logits)"
    x = draws.wide(real_floats(logits, "logits", called))
    x = jax.lax.stop_gradient(x)
    drawn = jax.random.bernoulli(key, jax.nn.sigmoid(x))
    sample = jnp.where(jnp.isnan(x), x, drawn.astype(x.dtype))
    return bernoulli_given(sample, logits, adjust)


@public
def bernoulli_given(
    sample: ArrayLike, logits: ArrayLike, adjust: Adjust = "identity"
) -> jax.Array:
    """Do as `bernoulli`, with the zeros and ones given.

    Forward: sample.
    Backward: as `bernoulli`; nothing to sample.

    Args:
      sample: zeros and ones of logits' shape, of any dtype.
      logits: floats of any shape.
      adjust: as in `bernoulli`.

    Returns:
      The sample in logits' dtype.

    Raises:
      TypeError, ValueError: as `bernoulli`; or sample has another shape.
    """
    called = "bernoulli_given(sample, logits)"
    x = real_floats(logits, "logits", called)
    value = draws.fitting(sample, "sample", x.shape, x.dtype, called)
    option(adjust, "adjust", ("identity", "sigmoid"), called)
    if adjust == "identity":
        return replace_value(x, value)
    return replace_value(jax.nn.sigmoid(draws.wide(x)).astype(x.dtype), value)


@public
def categorical(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    backward_temperature: ArrayLike | None = None,
) -> jax.Array:
    """Draw one class; the gradient is that of the softmax (straight-through).

    Biased, except for functions linear in the sample, at one temperature for both
    passes; for those it has no variance either, since J(p) g depends on no draw.

    Forward: one-hot of a class drawn from softmax(logits / temperature); the class that
      `jax.random.categorical` draws with this key.
    Backward: J(p) g / t with t = backward_temperature, p = softmax(logits / t).

    Args:
      key: a random key.
      logits: floats `[..., n]`.
      temperature: of the draw, above 0.
      backward_temperature: of the backward pass; temperature if not given. Liu et al.
        call this estimator STE and draw at 1.

    Returns:
      One-hot `[..., n]` of logits' dtype.

    Raises:
      TypeError: logits are not floating.
      ValueError: logits have no axis, or a temperature is not positive (where it is
        known) or does not broadcast.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> w, logits = jnp.array([1.0, 3.0]), jnp.zeros(2)
        >>> f = lambda l: w @ sg.sample.categorical(jax.random.key(0), l)
        >>> print(f(logits), jax.grad(f)(logits))
        3.0 [-0.5  0.5]

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    called = "categorical(key, logits)"
    x = draws.choices(logits, "logits", called)
    sample = draws.drawn(key, draws.tempered(x, temperature, "temperature", called))
    return categorical_given(sample, logits, temperature, backward_temperature)


@public
def categorical_given(
    sample: ArrayLike,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    backward_temperature: ArrayLike | None = None,
) -> jax.Array:
    """Do as `categorical`, with the class given.

    Forward: sample.
    Backward: as `categorical`; nothing to sample.

    Args:
      sample: one-hot `[..., n]`, of any dtype.
      logits: floats `[..., n]`.
      temperature: as in `categorical`.
      backward_temperature: as in `categorical`.

    Returns:
      The sample in logits' dtype.

    Raises:
      TypeError, ValueError: as `categorical`; sample has another shape.
    """
    called = "categorical_given(sample, logits)"
    x = draws.choices(logits, "logits", called)
    value = draws.fitting(sample, "sample", x.shape, x.dtype, called)
    soft = draws.softmax(x, temperature, backward_temperature, called)
    return replace_value(soft.astype(x.dtype), value)


@public
def reinmax(
    key: jax.Array, logits: ArrayLike, temperature: ArrayLike = 1.0
) -> jax.Array:
    """Draw one class; the gradient is right to second order.

    At temperature 1 unbiased for functions quadratic in the sample, where `categorical`
    is for linear ones (Heun's method against Euler's); at others biased even for linear
    ones. It varies with the draw for linear functions too. As in the `reinmax` package
    there is no factor 1 / t. The matrix below is the derivative of no function and held
    fixed: higher derivatives are those of a map linear in the logits.

    Forward: one-hot of a class D drawn from softmax(logits).
    Backward: 2 J((q + D) / 2) g - J(p) g / 2 with p = softmax(logits) and
      q = softmax(logits / temperature).

    Args:
      key: a random key.
      logits: floats `[..., n]`.
      temperature: of q alone, above 0; the authors advise 1 or more.

    Returns:
      One-hot `[..., n]` of logits' dtype.

    Raises:
      TypeError, ValueError: as `categorical`.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> w, logits = jnp.array([1.0, 3.0]), jnp.log(jnp.array([1.0, 3.0]))
        >>> f = lambda l: (w @ sg.sample.reinmax(jax.random.key(0), l)) ** 2
        >>> print(f(logits), jax.grad(f)(logits).round(1))
        9.0 [-1.5  1.5]

    Reference:
      Liu, Dong, Liu, Yu and Gao (2023), "Bridging Discrete and Backpropagation:
      Straight-Through and Beyond".
    """
    x = draws.choices(logits, "logits", "reinmax(key, logits)")
    return reinmax_given(draws.drawn(key, x), logits, temperature)


@public
def reinmax_given(
    sample: ArrayLike, logits: ArrayLike, temperature: ArrayLike = 1.0
) -> jax.Array:
    """Do as `reinmax`, with the class given.

    Forward: sample.
    Backward: as `reinmax`; nothing to sample.

    Args:
      sample: one-hot `[..., n]`, of any dtype.
      logits: floats `[..., n]`.
      temperature: as in `reinmax`.

    Returns:
      The sample in logits' dtype.

    Raises:
      TypeError, ValueError: as `reinmax`; sample has another shape.
    """
    called = "reinmax_given(sample, logits)"
    x = draws.choices(logits, "logits", called)
    value = draws.fitting(sample, "sample", x.shape, x.dtype, called)
    p = jax.nn.softmax(draws.wide(x))
    twice = draws.softmax(x, temperature, None, called) + value.astype(p.dtype)
    p, twice = jax.lax.stop_gradient((p, twice))
    step = draws.wide(replace_value(x, jnp.zeros_like(x)))  # -inf - -inf is nan

    def along(v: jax.Array) -> jax.Array:
        return v * jnp.sum(v * step, -1, keepdims=True)

    # 2 J(twice / 2) - J(p) / 2, times the step
    source = (twice - p / 2) * step + (along(p) - along(twice)) / 2
    return replace_value(source.astype(x.dtype), value)


@public
def top_k_mask(scores: ArrayLike, k: int) -> jax.Array:
    """Mark the k largest scores of each row; the gradient passes straight through.

    Biased; nothing is drawn. For the k largest of a whole tensor, as in edge-popup,
    ravel the scores.

    Forward: 1 at the k largest of the last axis, of equals the first; else 0. A row
      with a nan is nan. A score of -inf is one like any other: where fewer than k are
      above it, the first of them are marked too.
    Backward: g, at every score.

    Args:
      scores: floats `[..., n]`.
      k: how many, from 1 to n; an int.

    Returns:
      Zeros and ones `[..., n]` of scores' dtype, with k ones in each row.

    Raises:
      TypeError: scores are not floating, or k is no int.
      ValueError: scores have no axis, or k is not from 1 to n.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> scores = jnp.array([0.1, 0.9, 0.5])
        >>> mask = lambda s: sg.sample.top_k_mask(s, 2)
        >>> print(mask(scores), jax.grad(lambda s: mask(s) @ scores)(scores))
        [0. 1. 1.] [0.1 0.9 0.5]

    Reference:
      Ramanujan, Wortsman, Kembhavi, Farhadi and Rastegari (2020), "What's Hidden in a
      Randomly Weighted Neural Network?".
    """
    called = f"top_k_mask(scores, k={k})"
    x = draws.choices(scores, "scores", called)
    if whole(k, "k", called) > x.shape[-1]:
        expected = f"k is at most {x.shape[-1]}, the length of a row"
        raise wrong(ValueError, called, expected, type_of(x), f"k={x.shape[-1]}")
    fixed = jax.lax.stop_gradient(x)
    places = jax.lax.top_k(_unsigned_zero(fixed), k)[1]
    zeros = jnp.zeros_like(fixed)
    mask = jnp.put_along_axis(zeros, places, 1, axis=-1, inplace=False)
    top = jnp.max(fixed, -1, keepdims=True)
    return replace_value(x, jnp.where(jnp.isnan(top), top, mask))


def _unsigned_zero(x: jax.Array) -> jax.Array:
    """Return x with 0 for -0, which `lax.top_k` puts below 0.

    By its bits: where tiny numbers are flushed, they compare equal to 0 too.
    """
    width = jnp.finfo(x.dtype).bits
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    is_zero = (x == 0) & (bits == bits.dtype.type(1 << (width - 1)))
    return jnp.where(is_zero, jnp.zeros_like(x), x)


def __dir__() -> list[str]:
    return __all__
