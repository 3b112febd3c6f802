"""Gates: the value unchanged, the gradient changed.

Each gate takes a pytree and returns it, bit for bit; what it changes is the cotangent
that comes back. Parameters are ordinary arguments: they may be traced, scheduled,
carried in a scan or mapped, and receive no gradient of their own.

A gate acts on the whole cotangent of the value it is given. A value that `vmap` maps
is one value per example, and so is a varying value in `shard_map` one per shard; a
value that is not mapped is one value for all, gated once, on the sum (`per_example`
makes it one per example). What takes a whole tree (a norm, a function of a tree) takes
it as one value: mapped or varying where any of its leaves is. With
`shard_map(check_vma=False)` JAX cannot tell the two apart, and every device gates its
own cotangent.

Linear gates (scale, reverse, mask) have, to every order and in both modes, the
derivatives of `x -> x0 + s * (x - x0)`. The others act on cotangents only: tangents
pass unchanged, so a Hessian-vector product is not linear in its vector, and forward
over reverse and reverse over reverse differ. `cotangents.py` has those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from ._edge import public
from ._errors import beats, wrong
from ._gate.rule import Refusal, Rule
from ._gate.rules import MASK, NEGATE, REVERSE, SAME, SCALE
from ._gate.trees import axis_index, leaf_by_leaf, require_gradient
from ._places import printed_place
from ._where import Where, selected

__all__ = [
    "mask_gradient",
    "per_example",
    "prevent_gradient",
    "reversal_schedule",
    "reverse_gradient",
    "scale_gradient",
    "stop_gradient",
]

T = TypeVar("T")


@public
def stop_gradient(tree: T, where: Where = None) -> T:
    """Stop the gradient of a tree, or of the part of it that `where` selects.

    `jax.lax.stop_gradient` for any tree: strings, functions, ints and keys among the
    leaves are left alone, and a stop that stops nothing is an error.

    Forward: the tree itself.
    Backward: nothing passes at the selected leaves, in either mode.

    Args:
      tree: a pytree.
      where: a path, a list of paths, a boolean pytree, or a predicate (path, leaf);
        every leaf if not given.

    Returns:
      The same tree.

    Raises:
      AddressError: `where` selects no leaf that carries a gradient.
      TypeError: the tree has no such leaf.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> def loss(p):
        ...     p = sg.stop_gradient(p, "encoder")
        ...     return p["encoder"] * p["head"]
        >>> jax.grad(loss)({"encoder": 2.0, "head": 3.0})["encoder"]
        Array(0., dtype=float32, weak_type=True)
    """
    leaves, structure = jax.tree.flatten(tree)
    called = f"stop_gradient(tree, where={where!r:.60})" if where is not None else ""
    require_gradient(leaves, called or "stop_gradient(tree)")
    chosen = selected(tree, where, called)
    return structure.unflatten(
        [
            jax.lax.stop_gradient(x) if c else x
            for x, c in zip(leaves, chosen, strict=True)
        ]
    )


@public
def scale_gradient(tree: T, scale: Any) -> T:
    """Multiply the gradient by a number.

    Forward: the tree itself.
    Backward: cotangent * scale; to every order and in both modes that of
    `x0 + scale * (x - x0)` with a scale that is constant.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      scale: a number or an array that broadcasts to each leaf, or a tree of them with
        the tree's structure or a prefix of it. It may be traced; its own gradient is
        zero, and in the gradient of the tree it is a factor like any other.

    Returns:
      The same tree.

    Raises:
      ValueError: scale does not broadcast, or has another structure.
      TypeError: scale is no number, or the tree has no leaf that carries a gradient.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(jax.grad(lambda x: sg.scale_gradient(x, 0.5) ** 2)(3.0))
        3.0
    """
    return leaf_by_leaf(tree, {"scale": scale}, SCALE, "scale_gradient(tree, scale)")


@public
def reverse_gradient(tree: T, scale: Any = 1.0) -> T:
    """Reverse the gradient: what descends the loss behind it ascends in front of it.

    Forward: the tree itself.
    Backward: -scale * cotangent; to every order and in both modes that of
    `x0 - scale * (x - x0)`.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      scale: as in `scale_gradient`; often `reversal_schedule(...)(step)`.

    Returns:
      The same tree.

    Raises:
      ValueError: scale does not broadcast, or has another structure.
      TypeError: scale is no number, or the tree has no leaf that carries a gradient.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.reverse_gradient(x) ** 3
        >>> print(jax.grad(f)(2.0), jax.grad(jax.grad(f))(2.0))
        -12.0 12.0

    Reference:
      Ganin and Lempitsky (2015), "Unsupervised Domain Adaptation by Backpropagation".
    """
    called = "reverse_gradient(tree, scale)"
    if isinstance(scale, float | int) and scale == 1:  # a negation, and no product
        return leaf_by_leaf(tree, {}, NEGATE, called)
    return leaf_by_leaf(tree, {"scale": scale}, REVERSE, called)


@public
def reversal_schedule(
    transition_steps: int, rate: float = 10.0
) -> Callable[[Any], jax.Array]:
    """Return a schedule for `reverse_gradient`: from 0 to 1, steep at first.

    Forward: step -> 2 / (1 + exp(-rate * p)) - 1 with p = step / transition_steps, at
    most 1.
    Backward: an ordinary function of its step.

    Args:
      transition_steps: steps until p is 1, at least 1.
      rate: how steep.

    Returns:
      A function of the step (an int, or traced), as optax's schedules are.

    Raises:
      ValueError: transition_steps is below 1.

    Example:
        >>> import stopgrad_jax as sg
        >>> schedule = sg.reversal_schedule(100)
        >>> print(*(f"{schedule(step):.3f}" for step in (0, 10, 50, 100)))
        0.000 0.462 0.987 1.000

    Reference:
      Ganin and Lempitsky (2015), section 5.2.2 of the long version, with rate 10.
    """
    if transition_steps < 1:
        raise wrong(
            ValueError,
            "reversal_schedule(transition_steps)",
            "transition_steps is at least 1",
            repr(transition_steps),
            "reversal_schedule(total_steps)",
        )

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, float) / transition_steps, 0.0, 1.0)
        return jnp.tanh(0.5 * rate * progress)

    return schedule


@public
def mask_gradient(tree: T, mask: Any) -> T:
    """Let the gradient pass only where a mask is True.

    Forward: the tree itself.
    Backward: where(mask, cotangent, 0), so a nan or inf is masked too; to every order
    and in both modes that of `x0 + mask * (x - x0)`.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      mask: a bool or an array of bools that broadcasts to each leaf, or a tree of them
        with the tree's structure or a prefix of it. It may be traced.

    Returns:
      The same tree.

    Raises:
      ValueError: mask does not broadcast, or has another structure.
      TypeError: mask is not boolean, or the tree has no leaf that carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.mask_gradient(x, jnp.array([True, False])) ** 2)
        >>> print(jax.grad(f)(jnp.array([1.0, 2.0])))
        [2. 0.]
    """
    called = "mask_gradient(tree, mask)"
    for m in jax.tree.leaves(mask):
        dtype = getattr(m, "dtype", type(m))
        if dtype not in (bool, jnp.bool_):
            raise wrong(
                TypeError,
                called,
                "mask is boolean",
                f"{getattr(dtype, '__name__', dtype)}",
                f"sg.mask_gradient(tree, sg.mask(tree, {m!r}))"
                if isinstance(m, str)
                else "mask != 0, or sg.scale_gradient for a factor",
            )
    return leaf_by_leaf(tree, {"mask": mask}, MASK, called)


@public
def per_example(tree: T, axis_name: str | tuple[str, ...]) -> T:
    """Make a value that all examples share one value per example, to be gated so.

    Under `vmap(..., axis_name=...)` a value that is not mapped has one cotangent, the
    sum over examples. After this call it has one cotangent per example.

    Forward: the tree itself.
    Backward: the cotangent itself; what comes out in front of it is the sum over the
    axis.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      axis_name: the name, or names, given to `vmap` or of the mesh axes of `shard_map`.

    Returns:
      The same tree, mapped over the axis.

    Raises:
      NameError: there is no axis of that name here.
      ValueError: no axis is named.
      TypeError: the tree has no leaf that carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def f(w, x):
        ...     w = sg.per_example(w, "batch")  # without it: 1.0, the clipped sum
        ...     return sg.clip_gradient(w, -1.0, 1.0) * x
        >>> xs = jnp.array([3.0, 4.0])
        >>> total = lambda w: jax.vmap(lambda x: f(w, x), axis_name="batch")(xs).sum()
        >>> print(jax.grad(total)(1.0))
        2.0
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    called = f"per_example(tree, {axis_name!r})"
    if not names:
        raise wrong(
            ValueError, called, "an axis", "none", 'sg.per_example(tree, "batch")'
        )
    places = {name: axis_index(name, called) for name in names}
    return leaf_by_leaf(tree, places, SAME, called)


@public
def prevent_gradient(tree: T, message: str = "") -> T:
    """Raise if a gradient ever arrives here.

    `stop_gradient` ends a gradient in silence; this makes one an error, at the time
    the derivative is traced.

    Forward: the tree itself.
    Backward: an error, in either mode.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      message: why there must be none.

    Returns:
      The same tree.

    Raises:
      TypeError: the tree has no leaf that carries a gradient; and, when a derivative
        is traced or run through it, that one arrived.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.prevent_gradient(x, "labels are data") ** 2
        >>> print(f(3.0))
        9.0
        >>> jax.grad(f)(3.0)
        Traceback (most recent call last):
            ...
        TypeError: prevent_gradient: no gradient may arrive here: labels are data
          ...

    Reference:
      TensorFlow's `PreventGradient` operation.
    """
    line = _jax.line_here()
    place = f" ({printed_place(line)})" if line else ""
    because = f": {message}" if message else ""
    text = beats(
        "prevent_gradient",
        f"no gradient may arrive here{because}",
        f"a gradient arrives at prevent_gradient{place}",
        "sg.stop_gradient(tree), if it may arrive and must end here",
    )
    rule = Rule("prevent_gradient", Refusal(text), forward=text)
    return leaf_by_leaf(tree, {}, rule, "prevent_gradient(tree)")
