"""Gates that are not linear: clip, transform, filter the cotangent.

They act on cotangents only, at every order. Tangents pass unchanged, so forward over
reverse is the plain derivative of the gated backward pass, while reverse over reverse
gates the second cotangent too: the two differ, and a Hessian-vector product through
them is not linear in its vector. What value a gate acts on is told in `gates.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stopgrad_jax._jax as _jax

from ._checks import is_known, real_number
from ._edge import public
from ._errors import function_name, type_of, wrong
from ._gate.functions import same_types, stateless
from ._gate.primitive import varying_together
from ._gate.rule import Rule, program
from ._gate.rules import ABOVE, BELOW, BETWEEN, FINITE, NormClip
from ._gate.trees import all_at_once, axis_index, leaf_by_leaf, require_gradient
from ._trees import Split

__all__ = [
    "clip_gradient",
    "clip_gradient_norm",
    "replace_nonfinite_gradient",
    "transform_gradient",
]

T = TypeVar("T")


@public
def clip_gradient(tree: T, min: Any, max: Any) -> T:
    """Clip each entry of the gradient.

    Forward: the tree itself.
    Backward: clip(cotangent, min, max); nan stays nan. Tangents pass unchanged.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      min: a number or an array that broadcasts to each leaf, a tree of them, or None
        for no bound.
      max: likewise.

    Returns:
      The same tree.

    Raises:
      ValueError: min is above max (where both are known), or does not broadcast.
      TypeError: a bound is no number, a leaf is complex, or none carries a gradient.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> print(jax.grad(lambda x: sg.clip_gradient(x, -1.0, 1.0) ** 2)(3.0))
        1.0
    """
    called = "clip_gradient(tree, min, max)"
    _refuse_complex(tree, called)
    if min is None and max is None:
        raise wrong(
            TypeError, called, "a bound", "None and None", "clip_gradient(x, -1.0, 1.0)"
        )
    if max is None:
        return leaf_by_leaf(tree, {"min": min}, ABOVE, called)
    if min is None:
        return leaf_by_leaf(tree, {"max": max}, BELOW, called)
    _refuse_crossed(min, max, called)
    return leaf_by_leaf(tree, {"min": min, "max": max}, BETWEEN, called)


@public
def clip_gradient_norm(
    tree: T, max_norm: Any, *, axis_name: str | Sequence[str] | None = None
) -> T:
    """Scale the gradient down to a norm, if its norm is larger.

    The norm is that of the whole tree: all its cotangents together, also of leaves
    that nobody differentiates by. It is summed in float32 at least; squares that leave
    that range (a norm above 1.8e19) count as infinite, as in optax, and the gradient
    comes out as 0.

    Forward: the tree itself.
    Backward: cotangent * max_norm / max(norm, max_norm); nan where the norm is nan.
    Tangents pass unchanged.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      max_norm: a number, not negative; it may be traced.
      axis_name: mesh axes of `shard_map` (or axes of `vmap`) over which the value is
        spread: the norm is then that of all shards together, at the price of one
        collective. Without it a value that varies over shards is clipped shard by
        shard: cotangents of norm 2 on each of 4 devices and a maximum of 1 come out
        with norm 1 on each and 2 in all; with it, 1 in all.

    Returns:
      The same tree.

    Raises:
      ValueError: max_norm is negative (where it is known) or no scalar; a value does
        not vary over a named axis, so that each device's copy would count.
      NameError: there is no such axis here.
      TypeError: max_norm is no number, or no leaf carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.clip_gradient_norm(x, 1.0) ** 2)
        >>> print(jax.grad(f)(jnp.array([3.0, 4.0])))
        [0.6 0.8]

    Reference:
      Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent
      neural networks".
    """
    over = "" if axis_name is None else f", axis_name={axis_name!r}"
    called = f"clip_gradient_norm(tree, max_norm{over})"
    limit = _norm_limit(max_norm, called)
    names = () if axis_name is None else axis_name
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _require_varying(tree, name, called)
    rule = Rule("clip_gradient_norm", NormClip(names), axes=names)
    return all_at_once(tree, [limit], rule, called)


@public
def replace_nonfinite_gradient(tree: T, value: Any = 0.0) -> T:
    """Replace each nan and inf of the gradient.

    Forward: the tree itself, its own nan and inf included.
    Backward: where(isfinite(cotangent), cotangent, value). Tangents pass unchanged.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      value: a number or an array that broadcasts to each leaf, or a tree of them.

    Returns:
      The same tree.

    Raises:
      ValueError: value does not broadcast, or has another structure.
      TypeError: value is no number, or no leaf carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sqrt(sg.replace_nonfinite_gradient(x))
        >>> print(jax.grad(f)(0.0))
        0.0
    """
    called = "replace_nonfinite_gradient(tree, value)"
    return leaf_by_leaf(tree, {"value": value}, FINITE, called)


@public
def transform_gradient(
    tree: T, fn: Callable[[Any], Any] | optax.GradientTransformation
) -> T:
    """Apply any function to the gradient.

    Forward: the tree itself.
    Backward: fn(cotangent). Tangents pass unchanged. A value that nothing uses has no
    cotangent, and `fn` is not applied to it; inside a scan it has one of zeros. So let
    `fn` map zeros to zeros.

    Args:
      tree: a pytree; leaves that carry no gradient are left alone.
      fn: a function of the tree of cotangents, with None at leaves that carry none. It
        returns the same structure, shapes and dtypes, and may close over traced
        values. Or an optax transformation without state, such as
        `optax.clip_by_global_norm(1.0)`.

    Returns:
      The same tree.

    Raises:
      TypeError: `fn` changes structure, shape or dtype, or no leaf carries a gradient.
      ValueError: the optax transformation holds state or needs parameters.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: sg.transform_gradient(x, jnp.sign) ** 2
        >>> print(jax.grad(f)(3.0))
        1.0
    """
    is_optax = hasattr(fn, "init") and hasattr(fn, "update")
    name = "an optax transformation" if is_optax else function_name(fn)
    called = f"transform_gradient(tree, {name})"
    if not is_optax and not callable(fn):
        expected = "a function of the cotangent, or an optax transformation"
        raise wrong(TypeError, called, expected, repr(fn)[:60], "lambda ct: ...")
    leaves, structure = jax.tree.flatten(tree)
    require_gradient(leaves, called)
    function: Callable[[Any], Any] = stateless(fn, called) if is_optax else fn  # pyright: ignore
    carry = Split([_jax.carries_gradient(x) for x in leaves])
    arrays = list(map(jnp.asarray, carry.chosen(leaves)))

    def flat(*cts: Any) -> list[Any]:
        ct = structure.unflatten(carry.joined(cts, [None] * len(leaves)))
        return same_types(ct, function(ct), called)

    arrays = [_jax.vary(x, varying_together(arrays)) for x in arrays]
    pull, closed_over = program(flat, *arrays)
    axes = varying_together(arrays, closed_over)
    if axes != varying_together(arrays):  # what it closes over varies over more
        pull, closed_over = program(flat, *(_jax.vary(x, axes) for x in arrays))
    rule = Rule("transform_gradient", pull, typed=True)
    return all_at_once(tree, closed_over, rule, called)


# What is refused --------------------------------------------------------------------


def _refuse_complex(tree: Any, called: str) -> None:
    for leaf in jax.tree.leaves(tree):
        if _jax.carries_gradient(leaf) and jnp.iscomplexobj(leaf):
            raise wrong(
                TypeError,
                called,
                "a real value: complex numbers have no order",
                type_of(jnp.asarray(leaf)),
                "sg.clip_gradient_norm, which takes complex values",
            )


def _refuse_crossed(low: Any, high: Any, called: str) -> None:
    lows, highs = jax.tree.leaves(low), jax.tree.leaves(high)
    longest = max(len(lows), len(highs))
    lows, highs = (x * longest if len(x) == 1 else x for x in (lows, highs))
    if not all(map(is_known, (*lows, *highs))) or len(lows) != len(highs):
        return  # what else is wrong with them is said when they are used
    for one, other in zip(lows, highs, strict=True):
        if np.any(np.asarray(one) > np.asarray(other)):
            raise wrong(
                ValueError,
                called,
                "min is at most max",
                f"min={one}, max={other}",
                f"clip_gradient(x, {other}, {one})",
            )


def _norm_limit(max_norm: Any, called: str) -> jax.Array:
    limit = real_number(max_norm, "max_norm", called)
    if limit.ndim:
        came = type_of(limit)
        raise wrong(ValueError, called, "max_norm is a scalar", came, "max_norm=1.0")
    if not _jax.is_traced(max_norm) and np.asarray(max_norm) < 0:
        came = f"max_norm={max_norm}"
        instead = "sg.reverse_gradient, to turn a gradient round"
        raise wrong(ValueError, called, "max_norm is not negative", came, instead)
    return limit


def _require_varying(tree: Any, name: str, called: str) -> None:
    place = axis_index(name, called)
    if name not in _jax.varying(jax.typeof(place)):
        return  # vmap, or check_vma=False: JAX does not say what varies
    for leaf in jax.tree.leaves(tree):
        if _jax.carries_gradient(leaf) and name not in _jax.varying(jax.typeof(leaf)):
            raise wrong(
                ValueError,
                called,
                f"a value that is spread over {name!r}, to be summed over it",
                f"{type_of(jnp.asarray(leaf))}, the same on each device of "
                f"{name!r}: it would count once for each",
                "the call without axis_name: its gradient is summed already, or "
                f"sg.per_example(x, {name!r}) first",
            )
