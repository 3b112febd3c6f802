"""Gradients through time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from stopgrad_jax._checks import whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import function_name, wrong
from stopgrad_jax._gate.trees import require_gradient
from stopgrad_jax.gates import mask_gradient

__all__ = ["truncated_scan"]

Carry = TypeVar("Carry")


@public
def truncated_scan(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Any = None,
    length: int | None = None,
    *,
    every: int,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Carry, Any]:
    """Scan, and stop the gradient of the carry every so many steps.

    Truncated backpropagation through time. Only the carry is stopped: what `f` closes
    over, `xs` and what a carry hands on within a stretch learn from every step.

    Forward: `jax.lax.scan(f, init, xs)`, bit for bit.
    Backward: that of the scan, with a stop before the steps `every`, 2 * `every` and so
    on, counted in the order in which they run; in both modes and to every order. The
    first stretch reaches `init`; the last, shorter if `every` does not divide the
    length, is all that the final carry is learned by.

    Biased, towards what happens within a stretch, without variance; that of the scan
    from `every` = length on. It shortens the path of the gradient, not the memory of
    its values: for that, wrap `f` in `jax.checkpoint`.

    Args:
      f: a function of carry and one entry of xs that returns a new carry and an output.
      init: the first carry, a pytree; leaves that carry no gradient are left alone.
      xs: a tree of arrays whose first axis is stepped along, or None.
      length: number of steps; needed if there is no array in xs.
      every: steps from one stop to the next, a Python int, at least 1. At 1 nothing
        is learned through the carry.
      reverse: as for `jax.lax.scan`.
      unroll: as for `jax.lax.scan`.

    Returns:
      The final carry, and the outputs stacked.

    Raises:
      ValueError: every is below 1, or the number of steps is unknown.
      TypeError: every is no Python int, or init has no leaf that carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def total(w, every):
        ...     f = lambda carry, x: (w * carry + x, None)
        ...     return sg.recurrent.truncated_scan(f, 0.0, jnp.ones(4), every=every)[0]
        >>> print(*(jax.grad(total)(1.0, every) for every in (1, 2, 3, 4)))
        3.0 5.0 3.0 6.0

    Reference:
      Williams and Peng (1990), "An Efficient Gradient-Based Algorithm for On-Line
      Training of Recurrent Network Trajectories".
    """
    called = f"truncated_scan({function_name(f)}, init, xs, every={every!r:.40})"
    require_gradient(jax.tree.leaves(init), called)
    period = _period(every, called)
    steps = np.arange(_length(xs, length, called))
    if period >= len(steps):
        return jax.lax.scan(f, init, xs, length, reverse=reverse, unroll=unroll)
    passes = (steps % period != 0) | (steps == 0)

    def step(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        x, passing = inputs
        return f(mask_gradient(carry, passing), x)

    inputs = (xs, passes[::-1] if reverse else passes)
    return jax.lax.scan(step, init, inputs, length, reverse=reverse, unroll=unroll)


def _period(every: Any, called: str) -> int:
    return whole(every, "every", called, instead="every=20; jax.lax.scan for no stop")


def _length(xs: Any, length: int | None, called: str) -> int:
    for leaf in jax.tree.leaves(xs):
        if getattr(leaf, "ndim", 0):
            return leaf.shape[0]
    if length is None:
        expected = "an array in xs with an axis to step along, or a length"
        raise wrong(ValueError, called, expected, "neither", "length=100")
    return int(length)


def __dir__() -> list[str]:
    return __all__
