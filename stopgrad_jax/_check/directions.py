"""Where a function is looked at: directions of its leaves, weights of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

FEW = 8  # entries that are looked at one by one
TRIALS = 128  # of parts of a direction


def directions_of(rng: Any, leaf: jax.Array) -> Iterator[jax.Array]:
    """Yield directions: each entry if they are few, else one with a part of each.

    An entry moves by about its size, and by that of the others if it is zero; a tiny
    one by less than the others, that may be at the border of a domain.
    """
    x = np.abs(np.asarray(leaf, np.float64))
    finite = x[np.isfinite(x) & (x > 0)]
    usual = float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 1.0
    own = np.minimum(np.sqrt(x * usual), 100 * x)
    reach = np.where(np.isfinite(x) & (x > 0), own, usual)
    if x.size <= FEW:
        for k in range(x.size):
            one = np.zeros(x.size)
            one[k] = reach.flat[k]
            entry = jnp.asarray(one.reshape(x.shape), leaf.dtype)
            yield _jax.sharded_like(entry, leaf)
    else:
        every = jnp.asarray(_away_from_zero(rng, x.shape) * reach, leaf.dtype)
        yield _jax.sharded_like(every, leaf)


def random_weights(rng: Any, aval: Any) -> jax.Array:
    """Return a weight for each entry of a result."""
    numbers = jnp.asarray(_away_from_zero(rng, aval.shape), aval.dtype)
    return _jax.sharded_as(numbers, aval)


def one_weight(aval: Any) -> jax.Array:
    """Return the weight of a result of one entry."""
    return _jax.sharded_as(jnp.ones(aval.shape, aval.dtype), aval)


def apart(
    line: jax.Array, leaf: jax.Array, is_finite: Callable[[jax.Array], bool]
) -> list[jax.Array]:
    """Split a direction in one of entries where all is finite, and some of one entry.

    One entry with an infinite slope, or at the border of a domain, would make the sum
    over all of them infinite, and hide what is wrong with the others; and two such may
    make it nan. So they are looked at one by one, and a few stand for many.
    """
    steps, kept = np.asarray(line), np.zeros(line.size, bool)

    def part(where: np.ndarray) -> jax.Array:
        entries = np.where(where.reshape(line.shape), steps, 0)
        return _jax.sharded_like(jnp.asarray(entries, line.dtype), line)

    # Such entries are mostly alike, as zeros are: sorted, they lie side by side.
    runs, trials = [np.argsort(np.asarray(leaf), axis=None, kind="stable")], 0
    while runs and trials < TRIALS:
        run, trials = runs.pop(0), trials + 1
        where = np.zeros(line.size, bool)
        where[run] = True
        if is_finite(part(where)):
            kept |= where
        elif run.size > 1:
            runs += np.array_split(run, 2)
    if not kept.any() or kept.all() or not is_finite(part(kept)):
        return [line]
    steep = np.flatnonzero(~kept)
    few = steep[np.linspace(0, steep.size - 1, min(FEW, steep.size)).astype(int)]
    return [part(kept), *(part(np.arange(line.size) == k) for k in few)]


def turned_inside(
    line: jax.Array, is_finite: Callable[[jax.Array], bool], distance: float
) -> jax.Array:
    """Turn a direction so that the function is finite on one side of it at least.

    Where several entries are at the border of a domain, all have to go the same way.
    """
    h = jnp.asarray(distance, line.dtype)
    same = jnp.abs(line)
    if line.size > FEW and not any(is_finite(h * s * line) for s in (1, -1)):
        return same if any(is_finite(h * s * same) for s in (1, -1)) else line
    return line


def of_finite(weights: jax.Array, result: Any) -> jax.Array:
    """Return weights that are zero where a result is not finite."""
    finite = np.isfinite(np.asarray(result))
    if finite.all():
        return weights
    kept = jnp.asarray(np.where(finite, np.asarray(weights), 0), weights.dtype)
    return _jax.sharded_like(kept, weights)


def finite_where(weights: Sequence[jax.Array], results: Sequence[Any]) -> bool:
    """Tell whether all results are finite that have a weight."""
    pairs = zip(weights, results, strict=True)
    return all(np.isfinite(np.asarray(x)[np.asarray(w) != 0]).all() for w, x in pairs)


def _away_from_zero(rng: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return random numbers of either sign; a normal one may all but hide an entry."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)
