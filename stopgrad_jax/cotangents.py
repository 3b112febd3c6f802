"""Gates that are not linear: clip, transform, filter the cotangent.

They act on cotangents only, at every order. Tangents pass unchanged, so forward over
reverse is the plain derivative of the gated backward pass, while reverse over reverse
gates the second cotangent too: the two differ, and a Hessian-vector product through
them is not linear in its vector. What value a gate acts on is told in `gates.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stopgrad_jax._jax as _jax

from ._engine.gate import Rule, program, varying_together
from ._engine.gated import (
    all_at_once,
    axis_index,
    in_dtype_of_both,
    leaf_by_leaf,
    ranked,
    require_gradient,
)
from ._errors import beats, function_name, shortened, type_of

__all__ = [
    "clip_gradient",
    "clip_gradient_norm",
    "replace_nonfinite_gradient",
    "transform_gradient",
]

T = TypeVar("T")


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
        raise TypeError(
            beats(called, "a bound", "None and None", "clip_gradient(x, -1.0, 1.0)")
        )
    if max is None:
        return leaf_by_leaf(tree, {"min": min}, _ABOVE, called)
    if min is None:
        return leaf_by_leaf(tree, {"max": max}, _BELOW, called)
    _refuse_crossed(min, max, called)
    return leaf_by_leaf(tree, {"min": min, "max": max}, _BETWEEN, called)


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
    rule = Rule("clip_gradient_norm", _NormClip(names), axes=names)
    return all_at_once(tree, [limit], rule, called)


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
    return leaf_by_leaf(tree, {"value": value}, _FINITE, called)


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
        raise TypeError(beats(called, expected, repr(fn)[:60], "lambda ct: ..."))
    leaves, structure = jax.tree.flatten(tree)
    require_gradient(leaves, called)
    function: Callable[[Any], Any] = _stateless(fn, called) if is_optax else fn  # pyright: ignore
    carries = [_jax.carries_gradient(x) for x in leaves]
    arrays = [jnp.asarray(x) for x, c in zip(leaves, carries, strict=True) if c]

    def flat(*cts: Any) -> list[Any]:
        given = iter(cts)
        ct = structure.unflatten([next(given) if c else None for c in carries])
        return _same_types(ct, function(ct), called)

    arrays = [_jax.vary(x, varying_together(arrays)) for x in arrays]
    pull, closed_over = program(flat, *arrays)
    axes = varying_together(arrays, closed_over)
    if axes != varying_together(arrays):  # what it closes over varies over more
        pull, closed_over = program(flat, *(_jax.vary(x, axes) for x in arrays))
    rule = Rule("transform_gradient", pull, typed=True)
    return all_at_once(tree, closed_over, rule, called)


# The rules ------------------------------------------------------------------------


def _between(cts: Any, parameters: Any) -> Any:
    return _above(_below(cts, parameters[1:]), parameters)


def _above(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(jnp.maximum, cts[0], parameters[0])]


def _below(cts: Any, parameters: Any) -> Any:
    return [in_dtype_of_both(jnp.minimum, cts[0], parameters[0])]


def _finite(cts: Any, parameters: Any) -> Any:
    value = ranked(parameters[0].astype(cts[0].dtype), cts[0])
    return [jnp.where(jnp.isfinite(cts[0]), cts[0], value)]


_BETWEEN = Rule("clip_gradient", _between)
_ABOVE = Rule("clip_gradient", _above)
_BELOW = Rule("clip_gradient", _below)
_FINITE = Rule("replace_nonfinite_gradient", _finite)


@dataclasses.dataclass(frozen=True)
class _NormClip:
    """Scale cotangents down to a norm."""

    axes: tuple[str, ...]

    def __call__(self, cts: Any, parameters: Any) -> Any:
        # In float32 at least: a float16 cannot hold the square of 300.
        real = (jnp.finfo(ct.dtype).dtype for ct in cts)
        dtype = max(jnp.dtype("float32"), *real, key=lambda d: d.itemsize)
        squares = [jnp.sum(jnp.square(jnp.abs(ct).astype(dtype))) for ct in cts]
        total = sum(squares[1:], squares[0])
        if self.axes:
            total = jax.lax.psum(total, self.axes)
        factor = _shrink(total, parameters[0].astype(dtype))
        return [in_dtype_of_both(jnp.multiply, ct, factor) for ct in cts]


@jax.custom_jvp
def _shrink(square: jax.Array, limit: jax.Array) -> jax.Array:
    """Return min(1, limit / norm), 1 for a norm of 0, nan for one of nan."""
    smallest = jnp.finfo(square.dtype).tiny
    return jnp.minimum(limit / jnp.sqrt(jnp.maximum(square, smallest)), 1)


@_shrink.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # By hand, since a zero cotangent has a norm without derivative: 0 * inf is nan.
    (square, limit), (square_dot, limit_dot) = primals, tangents
    factor = _shrink(square, limit)
    norm = jnp.sqrt(jnp.where(factor < 1, square, jnp.ones_like(square)))
    slope = limit_dot / norm - limit / (2 * norm**3) * square_dot
    return factor, jnp.where(factor < 1, slope, jnp.zeros_like(slope))


# What is refused --------------------------------------------------------------------


def _refuse_complex(tree: Any, called: str) -> None:
    for leaf in jax.tree.leaves(tree):
        if _jax.carries_gradient(leaf) and jnp.iscomplexobj(leaf):
            raise TypeError(
                beats(
                    called,
                    "a real value: complex numbers have no order",
                    type_of(jnp.asarray(leaf)),
                    "sg.clip_gradient_norm, which takes complex values",
                )
            )


def _refuse_crossed(low: Any, high: Any, called: str) -> None:
    lows, highs = jax.tree.leaves(low), jax.tree.leaves(high)
    longest = max(len(lows), len(highs))
    lows, highs = (x * longest if len(x) == 1 else x for x in (lows, highs))
    if not all(map(_is_known, (*lows, *highs))) or len(lows) != len(highs):
        return  # what else is wrong with them is said when they are used
    for one, other in zip(lows, highs, strict=True):
        if np.any(np.asarray(one) > np.asarray(other)):
            raise ValueError(
                beats(
                    called,
                    "min is at most max",
                    f"min={one}, max={other}",
                    f"clip_gradient(x, {other}, {one})",
                )
            )


def _is_known(x: Any) -> bool:
    numbers = bool | int | float | np.ndarray | np.generic | jax.Array
    return isinstance(x, numbers) and not _jax.is_traced(x)


def _norm_limit(max_norm: Any, called: str) -> jax.Array:
    try:
        limit = jnp.asarray(max_norm)
        is_number = jnp.issubdtype(limit.dtype, jnp.number)
        is_number &= not jnp.iscomplexobj(limit)
    except TypeError:
        limit, is_number = jnp.zeros(()), False
    if not is_number:
        came = repr(max_norm)[:60]
        raise TypeError(
            beats(called, "max_norm is a real number", came, "max_norm=1.0")
        )
    if limit.ndim:
        came = type_of(limit)
        raise ValueError(beats(called, "max_norm is a scalar", came, "max_norm=1.0"))
    if not _jax.is_traced(max_norm) and np.asarray(max_norm) < 0:
        came = f"max_norm={max_norm}"
        instead = "sg.reverse_gradient, to turn a gradient round"
        raise ValueError(beats(called, "max_norm is not negative", came, instead))
    return limit


def _require_varying(tree: Any, name: str, called: str) -> None:
    place = axis_index(name, called)
    if name not in _jax.varying(jax.typeof(place)):
        return  # vmap, or check_vma=False: JAX does not say what varies
    for leaf in jax.tree.leaves(tree):
        if _jax.carries_gradient(leaf) and name not in _jax.varying(jax.typeof(leaf)):
            raise ValueError(
                beats(
                    called,
                    f"a value that is spread over {name!r}, to be summed over it",
                    f"{type_of(jnp.asarray(leaf))}, the same on each device of "
                    f"{name!r}: it would count once for each",
                    "the call without axis_name: its gradient is summed already, or "
                    f"sg.per_example(x, {name!r}) first",
                )
            )


def _stateless(transformation: Any, called: str) -> Callable[[Any], Any]:
    def update(ct: Any) -> Any:
        state = transformation.init(ct)
        if jax.tree.leaves(state):
            raise ValueError(
                beats(
                    called,
                    "an optax transformation without state: a gate has none",
                    f"state {jax.tree.structure(state)}",
                    "it in the optimizer's chain, or a function of the cotangent",
                )
            )
        try:
            return transformation.update(ct, state, None)[0]
        except ValueError as error:
            raise ValueError(
                beats(
                    called,
                    "an optax transformation that needs no parameters",
                    shortened(error),
                    "it in the optimizer's chain, where parameters are",
                )
            ) from error

    return update


def _same_types(ct: Any, out: Any, called: str) -> list[Any]:
    leaves, structure = jax.tree.flatten(ct)
    if jax.tree.structure(out) != structure:
        raise TypeError(
            beats(
                called,
                f"the function returns a tree like its argument, {structure}",
                str(jax.tree.structure(out)),
                "jax.tree.map(function_of_a_leaf, ct)",
            )
        )
    results = [jnp.asarray(x) for x in jax.tree.leaves(out)]
    for old, new in zip(leaves, results, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                beats(
                    called,
                    f"the function keeps shape and dtype, {type_of(old)}",
                    type_of(new),
                    "new.astype(ct.dtype)"
                    if old.shape == new.shape
                    else f"a function that returns shape {old.shape}",
                )
            )
    return results
