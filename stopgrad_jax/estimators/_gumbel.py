"""Choices by Gumbel noise: `sample.gumbel_softmax` and `sample.gumbel_rao`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stopgrad_jax._checks import whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.substitution import replace_value

from . import _draws as draws


@public
def gumbel_softmax(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike,
    hard: bool = True,
    backward_temperature: ArrayLike | None = None,
) -> jax.Array:
    """Draw one class by Gumbel noise; the gradient is that of the noisy softmax.

    Soft, it is the exact gradient of a relaxed problem, and the bias goes to 0 with the
    temperature; hard, it is biased even for linear functions, and in that limit right
    for quadratic ones. The variance grows without bound there: of two classes and a
    linear function, as 1 / temperature. PyTorch's `F.gumbel_softmax` does this.

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
        >>> print(f(logits), *(f"{d:.2f}" for d in jax.grad(f)(logits)))
        3.0 -0.41 0.41

    Reference:
      Jang, Gu and Poole (2017), "Categorical Reparameterization with Gumbel-Softmax".
    """
    called = "gumbel_softmax(key, logits, temperature)"
    x = draws.choices(logits, "logits", called)
    noise = jax.random.gumbel(key, x.shape, draws.wide(x).dtype)
    return gumbel_softmax_given(noise, logits, temperature, hard, backward_temperature)


@public
def gumbel_softmax_given(
    noise: ArrayLike,
    logits: ArrayLike,
    temperature: ArrayLike,
    hard: bool = True,
    backward_temperature: ArrayLike | None = None,
) -> jax.Array:
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
    x = draws.choices(logits, "logits", called)
    z = draws.wide(x)
    z = z + draws.fitting(noise, "noise", x.shape, z.dtype, called)
    soft = draws.softmax(z, temperature, backward_temperature, called).astype(x.dtype)
    if hard:
        return replace_value(soft, draws.one_hot(z).astype(x.dtype))
    if backward_temperature is None:
        return soft
    value = draws.softmax(z, temperature, None, called)
    return replace_value(soft, value.astype(x.dtype))


@public
def gumbel_rao(
    key: jax.Array, logits: ArrayLike, temperature: ArrayLike, num_samples: int
) -> jax.Array:
    """Draw one class; average the gradient of `gumbel_softmax` over the noise.

    The bias is that of the hard `gumbel_softmax` at the same temperature. So is the
    variance with one sample; it falls with their number, to that of the mean given the
    class. The noise is drawn given the class, and that depends on the logits too; it is
    held fixed. Differentiating through it, as one sentence of the paper says, is
    another gradient, no longer that of Gumbel-softmax in the mean.

    Forward: one-hot of a class D drawn from softmax(logits).
    Backward: the mean of J(p) g / t over num_samples draws of z = logits + noise, given
      that D is their argmax, with t = temperature and p = softmax(z / t).

    Args:
      key: a random key.
      logits: floats `[..., n]`.
      temperature: above 0.
      num_samples: how many draws of noise, at least 1; each is as large as logits.

    Returns:
      One-hot `[..., n]` of logits' dtype.

    Raises:
      TypeError: logits are not floating, or num_samples is no int.
      ValueError: num_samples is below 1; or as `categorical`.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> w, logits = jnp.array([1.0, 3.0]), jnp.zeros(2)
        >>> f = lambda l: w @ sg.sample.gumbel_rao(jax.random.key(0), l, 1.0, 1000)
        >>> print(f(logits), *(f"{d:.2f}" for d in jax.grad(f)(logits)))
        1.0 -0.33 0.33

    Reference:
      Paulus, Maddison and Krause (2021), "Rao-Blackwellizing the Straight-Through
      Gumbel-Softmax Gradient Estimator".
    """
    called = f"gumbel_rao(key, logits, temperature, num_samples={num_samples})"
    x = draws.choices(logits, "logits", called)
    shape = (whole(num_samples, "num_samples", called), *x.shape)
    for_sample, for_noise = jax.random.split(key)
    noise = jax.random.gumbel(for_noise, shape, draws.wide(x).dtype)
    return gumbel_rao_given(noise, draws.drawn(for_sample, x), logits, temperature)


@public
def gumbel_rao_given(
    noise: ArrayLike, sample: ArrayLike, logits: ArrayLike, temperature: ArrayLike
) -> jax.Array:
    """Do as `gumbel_rao`, with the class and the noise given.

    Forward: sample.
    Backward: as `gumbel_rao`; nothing to noise or sample.

    Args:
      noise: standard Gumbel noise `[num_samples, ..., n]`, not yet conditioned on the
        sample, best of float32.
      sample: one-hot `[..., n]`, of any dtype.
      logits: floats `[..., n]`.
      temperature: as in `gumbel_rao`.

    Returns:
      The sample in logits' dtype.

    Raises:
      TypeError, ValueError: as `gumbel_rao`; noise or sample has another shape.
    """
    called = "gumbel_rao_given(noise, sample, logits, temperature)"
    x = draws.choices(logits, "logits", called)
    value = draws.fitting(sample, "sample", x.shape, x.dtype, called)
    g = jnp.asarray(noise)
    if g.ndim != x.ndim + 1 or not g.shape[0]:
        expected = "noise with a leading axis, num_samples of the shape of logits"
        instead = "jax.random.gumbel(key, (num_samples, *logits.shape))"
        raise wrong(ValueError, called, expected, type_of(g), instead)
    shape, w = (g.shape[0], *x.shape), draws.wide(x)
    g = draws.fitting(g, "noise", shape, w.dtype, called)
    draws.tempered(x, temperature, "temperature", called)  # to refuse what is none
    z = draws.given_top(g, value, jax.lax.stop_gradient(w))
    z = replace_value(jnp.broadcast_to(w[None], shape), z)  # what was drawn is fixed
    soft = jnp.mean(draws.softmax(z, temperature, None, called), 0)
    return replace_value(soft.astype(x.dtype), value)
