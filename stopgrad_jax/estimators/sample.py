"""Discrete choices with a gradient: what is drawn goes forward, a relaxation back.

Each estimator has two forms: `f(key, logits, ...)` draws; `f_given(draw, logits, ...)`
is the same with the draw given, to replay or to enumerate. Below g is the cotangent of
the sample, p a vector of probabilities and J(p) g = p * (g - <g, p>), the derivative of
a softmax. A choice is made along the last axis; the axes before it are a batch.

Draws and softmaxes are computed in float32 at least, whatever the dtype of the logits:
16-bit noise has too few values, and its ties favor the first class. A nan among logits
makes the sample nan; a logit of -inf is a class that is never chosen. Temperatures are
numbers or arrays that broadcast to the logits; they may be traced, and learn as they do
in the softmax of the backward pass.
"""

from __future__ import annotations

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, type_of
from stopgrad_jax.substitution import replace_value

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


def bernoulli(key: jax.Array, logits: ArrayLike, adjust: Adjust = "identity") -> Any:
    """Draw zeros and ones; the gradient passes straight through.

    Biased, except for functions linear in the sample under "sigmoid"; no variance of
    its own beside that of g.

    Forward: 1 with probability sigmoid(logits), else 0.
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
    x = jax.lax.stop_gradient(_wide(_floating(logits, "logits", called)))
    drawn = jax.random.bernoulli(key, jax.nn.sigmoid(x))
    sample = jnp.where(jnp.isnan(x), x, drawn.astype(x.dtype))
    return bernoulli_given(sample, logits, adjust)


def bernoulli_given(
    sample: ArrayLike, logits: ArrayLike, adjust: Adjust = "identity"
) -> Any:
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
      TypeError, ValueError: as `bernoulli`; sample has another shape.
    """
    called = "bernoulli_given(sample, logits)"
    x = _floating(logits, "logits", called)
    value = _fitting(sample, x, called)
    if adjust == "identity":
        return replace_value(x, value)
    if adjust == "sigmoid":
        return replace_value(jax.nn.sigmoid(_wide(x)).astype(x.dtype), value)
    expected = 'adjust is "identity" or "sigmoid"'
    raise ValueError(beats(called, expected, repr(adjust), 'adjust="sigmoid"'))


def categorical(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    backward_temperature: ArrayLike | None = None,
) -> Any:
    """Draw one class; the gradient is that of the softmax (straight-through).

    Biased, except for functions linear in the sample; of little variance, since nothing
    but the sample is drawn. The softmax itself is its mean.

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
    x = _choices(logits, called)
    tempered = _tempered(x, temperature, "temperature", called)
    sample = _drawn(key, tempered)
    return categorical_given(sample, logits, temperature, backward_temperature)


def categorical_given(
    sample: ArrayLike,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    backward_temperature: ArrayLike | None = None,
) -> Any:
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
    x = _choices(logits, called)
    value = _fitting(sample, x, called)
    soft = _softmax(x, temperature, backward_temperature, called)
    return replace_value(soft.astype(x.dtype), value)


def gumbel_softmax(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike,
    hard: bool = True,
    backward_temperature: ArrayLike | None = None,
) -> Any:
    """Draw one class by Gumbel noise; the gradient is that of the noisy softmax.

    Soft, it is the exact gradient of a relaxed problem; hard, straight-through and
    biased. With the temperature the bias falls and the variance grows, without bound.
    PyTorch's `F.gumbel_softmax` and DeepMind's notebooks do this, with a value that is
    one-hot only up to rounding.

    Forward: z = logits + noise; one-hot of argmax z (hard) or softmax(z / temperature).
    Backward: J(p) g / t with t = backward_temperature, p = softmax(z / t).

    Args:
      key: a random key.
      logits: floats `[..., n]`.
      temperature: above 0. Where `hard`, the value does not depend on it.
      hard: whether the value is one-hot.
      backward_temperature: of the backward pass; temperature if not given.

    Returns:
      A sample `[..., n]` of logits' dtype.

    Raises:
      TypeError, ValueError: as `categorical`.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> w, logits = jnp.array([1.0, 3.0]), jnp.zeros(2)
        >>> f = lambda l: w @ sg.sample.gumbel_softmax(jax.random.key(0), l, 1.0)
        >>> print(f(logits), jax.grad(f)(logits).round(2))
        3.0 [-0.43  0.43]

    Reference:
      Jang, Gu and Poole (2017), "Categorical Reparameterization with Gumbel-Softmax".
    """
    x = _choices(logits, "gumbel_softmax(key, logits, temperature)")
    noise = jax.random.gumbel(key, x.shape, _wide(x).dtype)
    return gumbel_softmax_given(noise, logits, temperature, hard, backward_temperature)


def gumbel_softmax_given(
    noise: ArrayLike,
    logits: ArrayLike,
    temperature: ArrayLike,
    hard: bool = True,
    backward_temperature: ArrayLike | None = None,
) -> Any:
    """Do as `gumbel_softmax`, with the noise given.

    Forward: as `gumbel_softmax`.
    Backward: as `gumbel_softmax`; nothing to noise.

    Args:
      noise: standard Gumbel noise `[..., n]`, best of float32.
      logits: floats `[..., n]`.
      temperature: as in `gumbel_softmax`.
      hard: as in `gumbel_softmax`.
      backward_temperature: as in `gumbel_softmax`.

    Returns:
      A sample `[..., n]` of logits' dtype.

    Raises:
      TypeError, ValueError: as `gumbel_softmax`; noise has another shape.
    """
    called = "gumbel_softmax_given(noise, logits, temperature)"
    x = _choices(logits, called)
    z = _wide(x) + _noise(noise, x, x.shape, called)
    soft = _softmax(z, temperature, backward_temperature, called).astype(x.dtype)
    if hard:
        return replace_value(soft, _one_hot(z).astype(x.dtype))
    if backward_temperature is None:
        return soft
    return replace_value(soft, _softmax(z, temperature, None, called).astype(x.dtype))
