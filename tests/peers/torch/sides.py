"""A function in JAX and one in torch, on the same numbers, forward and pulled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

torch.set_num_threads(1)  # the tests themselves run in parallel
DTYPES = ("float32", "float64")

# Thresholds of all the presets, the numbers next to them, and what overflows.
_CORNERS = [1 / 25, 0.25, 0.5, 1.0, 2.0]
_NEAR = [np.nextafter(np.float32(c), np.float32(to)) for c in _CORNERS for to in (0, 9)]
_POSITIVE = [*_CORNERS, *_NEAR, 1e-30, 1e-6, 3.6, 10.0, 100.0, 1e4, 1e18]
EDGES = np.float32([0.0, -0.0, *_POSITIVE, *(-np.float32(_POSITIVE))])


def points(dtype: str = "float32", size: int = 200) -> np.ndarray:
    """Return edges and normal numbers of three sizes."""
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=size) * scale for scale in (0.1, 1.0, 10.0)]
    return np.concatenate([EDGES, *drawn]).astype(dtype)


def cotangent(like: np.ndarray) -> np.ndarray:
    """Return numbers of both signs, none of them 0 or 1."""
    rng = np.random.default_rng(1)
    sizes, signs = rng.uniform(0.3, 2.0, like.shape), rng.choice([-1, 1], like.shape)
    return (sizes * signs).astype(like.dtype)


def ours(fun: Callable, *args: Any, ct: Any = None) -> list[np.ndarray]:
    """Return the value and the gradients of all arguments; in the dtype given."""
    with jax.enable_x64(any(np.asarray(a).dtype == "float64" for a in args)):
        value, pull = jax.vjp(fun, *map(jnp.asarray, args))
        ct = jnp.asarray(cotangent(np.asarray(value)) if ct is None else ct)
        return [np.asarray(a) for a in (value, *pull(ct.astype(value.dtype)))]


def theirs(fun: Callable, *args: Any, ct: Any) -> list[np.ndarray]:
    """Return the same of a function of torch; what gets no gradient has 0."""
    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in args]
    value = fun(*leaves)
    ct = torch.tensor(np.asarray(ct)).to(value.dtype)
    grads = torch.autograd.grad(value, leaves, ct, allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(leaves, grads, strict=True)
    ]
    return [a.detach().numpy() for a in (value, *grads)]


def both(mine: Callable, other: Callable, *args: Any, ct: Any = None) -> Any:
    """Return value and gradients of either, for one cotangent of the value's shape."""
    args = tuple(np.asarray(a) for a in args)
    if ct is None:
        ct = cotangent(np.asarray(ours(mine, *args)[0]))
    return ours(mine, *args, ct=ct), theirs(other, *args, ct=ct)


def assert_alike(
    mine: Callable,
    other: Callable,
    *args: Any,
    ct: Any = None,
    rtol: float = 2e-6,
    atol: float = 1e-37,  # XLA flushes what is smaller than the smallest normal number
) -> None:
    """Check that the values are equal, and the gradients up to rounding."""
    (value, *grads), (their_value, *their_grads) = both(mine, other, *args, ct=ct)
    np.testing.assert_array_equal(value, their_value)
    for grad, their_grad in zip(grads, their_grads, strict=True):
        np.testing.assert_allclose(grad, their_grad, rtol, atol)
