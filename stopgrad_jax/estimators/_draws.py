"""What the estimators of `sample` share: their inputs checked, their draws made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import stopgrad_jax._jax as _jax
from stopgrad_jax._checks import real_floats, real_number, require_broadcast
from stopgrad_jax._errors import type_of, wrong

from ._inputs import wide as wide


def choices(x: ArrayLike, name: str, called: str) -> jax.Array:
    """Return floats whose last axis is what is chosen from."""
    array = real_floats(x, name, called)
    if not array.ndim or not array.shape[-1]:
        expected = f"{name} with a last axis, the classes to choose from"
        instead = f"{name}[..., None], or sg.sample.bernoulli for a choice of two"
        raise wrong(ValueError, called, expected, type_of(array), instead)
    return array


def fitting(
    draw: ArrayLike, name: str, shape: tuple[int, ...], dtype: jnp.dtype, called: str
) -> jax.Array:
    """Return a given draw in a dtype, without gradient; refuse another shape."""
    array = jnp.asarray(draw)
    if array.shape != shape:
        expected = f"{name} of shape {shape}, for logits of shape {shape}"
        instead = f"jax.nn.one_hot({name}, {shape[-1] if shape else 2})"
        if array.shape != shape[:-1] or not shape:
            instead = f"jnp.broadcast_to({name}, {shape})"
        raise wrong(ValueError, called, expected, type_of(array), instead)
    return jax.lax.stop_gradient(array.astype(dtype))


def tempered(x: jax.Array, temperature: ArrayLike, name: str, called: str) -> jax.Array:
    """Divide float32 at least by a temperature."""
    x, t = wide(x), real_number(temperature, name, called)
    instead = f"{name}[..., None], for one of each choice"
    require_broadcast(t, name, x, called, "logits", instead)
    known = not _jax.is_traced(temperature)  # under jit jnp.asarray(1.0) is traced
    if known and not np.all(np.asarray(temperature) > 0):
        came = f"{name}={temperature}"
        instead = "a schedule that ends above 0, such as optax.exponential_decay"
        raise wrong(ValueError, called, f"{name} is above 0", came, instead)
    t = jnp.broadcast_to(t.astype(x.dtype), x.shape)
    if known:
        return x / t
    # By 0, all quotients are infinite or nan, and so the sample and its gradient are.
    t = jnp.where(t > 0, t, jnp.zeros_like(t))
    # -inf stays what it is, or it would make the derivative by the temperature nan.
    never = x == -jnp.inf
    return jnp.where(never, x, jnp.where(never, jnp.zeros_like(x), x) / t)


def softmax(
    x: jax.Array, temperature: ArrayLike, backward: ArrayLike | None, called: str
) -> jax.Array:
    """Compute the softmax at the temperature of the backward pass."""
    if backward is None:
        return jax.nn.softmax(tempered(x, temperature, "temperature", called))
    tempered(x, temperature, "temperature", called)  # to refuse what is none
    return jax.nn.softmax(tempered(x, backward, "backward_temperature", called))


def one_hot(scores: jax.Array) -> jax.Array:
    """Mark the largest of each row, the first of equals; nan where softmax is nan.

    That is where one is nan or inf, or all are -inf: argmax would then name a class.
    """
    scores = jax.lax.stop_gradient(scores)
    hot = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)
    top = jnp.max(scores, -1, keepdims=True)
    return jnp.where(jnp.isfinite(top), hot, top - top)


def drawn(key: jax.Array, x: jax.Array) -> jax.Array:
    """Draw a class from softmax(x), the one that `jax.random.categorical` draws."""
    x = jax.lax.stop_gradient(wide(x))
    return one_hot(jax.random.gumbel(key, x.shape, x.dtype) + x)


def given_top(noise: jax.Array, sample: jax.Array, x: jax.Array) -> jax.Array:
    """Move Gumbel noise `[k, ..., n]` to x + noise, given that `sample` is its argmax.

    Section 3 of Paulus et al., in logarithms: with log Z = logsumexp(x), the largest
    is noise + log Z at the chosen class; the others are truncated there.
    """
    total = jax.nn.logsumexp(x, axis=-1, keepdims=True)
    chosen, x = (sample != 0)[None], x[None]
    top = jnp.sum(jnp.where(chosen, noise, 0), -1, keepdims=True) + total[None]
    return jnp.where(chosen, top, -jnp.logaddexp(-(noise + x), -top))
