"""Single entries of arrays: which are nan or inf, and which of them matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .devices import placed_like

Index = tuple[int, ...]


def is_inexact(x: Any) -> bool:
    """Tell a value that can hold nan and inf."""
    dtype = getattr(x, "dtype", None) or np.result_type(type(x))
    return jnp.issubdtype(dtype, jnp.inexact)


def count_nonfinite(x: Any) -> int:
    """Count the nan and inf of a value."""
    return int(nonfinite(x).sum()) if is_inexact(x) else 0


def nonfinite(x: Any) -> np.ndarray:
    """Return where a value is nan or inf."""
    return ~np.isfinite(wide(x))


def has_nan(x: Any) -> bool:
    """Tell whether there is nan in a value."""
    return is_inexact(x) and bool(np.isnan(wide(x)).any())


def is_nan(x: Any, index: Index) -> bool:
    """Tell whether an entry of a value is nan."""
    return bool(np.isnan(wide(x)[index]))


def is_bad(x: Any, index: Index) -> bool:
    """Tell whether an entry of a value is nan or inf."""
    return not np.isfinite(wide(x)[index])


def wide(x: Any) -> np.ndarray:
    """Return a value in a dtype that NumPy itself knows."""
    x = np.asarray(x)
    return x if x.dtype.kind in "fc" else x.astype(np.float32)


def known(x: Any) -> Any:
    """Return a value as it is shown: a NumPy array, or a key as it is."""
    return x if _jax.is_key(x) else np.asarray(x)


# Ordinary numbers -----------------------------------------------------------------

# An operation may have a result for some numbers and none for others: the logarithm
# has none below zero, `arccosh` none below one, a Cholesky factorization none of most
# matrices. What is nonfinite with each of these is so whatever stands there.
FILLS = ("small", "large", "negative", "identity", "own")


def ordinary(x: Any, kept: np.ndarray | None = None, fill: str = "small") -> Any:
    """Replace nan and inf, where they are not kept, by ordinary numbers.

    They are neither zero, one, nor alike, so that no product, difference or comparison
    of them is special.
    """
    # A copy: NumPy's view of a JAX array cannot be written to.
    array = np.array(np.asarray(x))
    where = nonfinite(array)
    if kept is not None:
        where = where & ~kept
    numbers = _numbers(array.shape, fill)
    if fill == "own" and not where.all():  # like the others of the same array
        numbers = numbers * wide(array)[np.isfinite(wide(array))].mean()
    array[where] = numbers[where].astype(array.dtype)
    return placed_like(array, x)


def _numbers(shape: Index, fill: str) -> np.ndarray:
    places = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    numbers = 0.5 + 0.25 * np.sin(1.0 + places)
    if fill == "large":
        return 1.0 + numbers
    if fill == "negative":
        return -numbers
    if fill == "identity" and len(shape) > 1:  # symmetric and positive definite
        row, column = np.indices(shape)[-2:]
        numbers = 0.25 * np.sin(1.0 + row + column) / max(shape)
        return np.where(row == column, 2.0 + row / max(shape), numbers)
    return numbers


# The entry that matters -----------------------------------------------------------


def critical(fails: Callable[[int], bool], length: int) -> int:
    """Return the first of some entries without which something would not fail.

    `fails(n)` tells whether it fails with the first n of them: not with none, but with
    all. So it does with those up to the returned one, and not without that one.
    """
    good, bad = 0, length
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(middle):
            bad = middle
        else:
            good = middle
    return bad - 1


def places(x: Any) -> np.ndarray:
    """Return the numbers of the nan and inf among the entries of a value."""
    return np.flatnonzero(nonfinite(x))


def only(shape: Index, numbers: Any) -> np.ndarray:
    """Return a mask of the entries with these numbers."""
    mask = np.zeros(shape, bool)
    mask.reshape(-1)[numbers] = True
    return mask


def index_of(number: int, shape: Index) -> Index:
    """Return the index of the entry with this number."""
    return tuple(map(int, np.unravel_index(number, shape)))
