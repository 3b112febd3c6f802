"""Substitution: the value of one thing, the derivative of another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from ._checks import require_call, require_function, require_same_tree
from ._edge import public
from ._errors import function_name, type_of, wrong
from ._gate.backward import attached
from ._gate.primitive import gate
from ._gate.rules import VALUE_OF, VALUE_OF_FORWARD, Rule
from ._gate.trees import require_gradient
from ._reach.own_stop import handed

__all__ = ["replace_value", "straight_through", "with_backward"]

P = ParamSpec("P")
T = TypeVar("T")


@public
def replace_value(x: T, value: Any) -> T:
    """Return a value with the derivative of `x`.

    What `x + stop_gradient(value - x)` means, exactly: that line misses the value where
    the two `x` do not cancel, and is nan where they are infinite.

    Forward: value, bit for bit.
    Backward: the cotangent goes to `x`, nothing to `value`; in both modes and to every
    order the derivative is that of `x`.

    Args:
      x: a pytree.
      value: a tree of the same structure and shapes. An int or bool leaf is cast to the
        dtype of x's. Where x's leaf carries no gradient, value's is returned.

    Returns:
      A tree like `x`.

    Raises:
      TypeError: a floating dtype differs, or x has no leaf that carries a gradient.
      ValueError: a shape or the structure differs.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: sg.replace_value(x, jnp.round(x)) ** 2
        >>> print(f(2.3), jax.grad(f)(2.3))
        4.0 4.0

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    return _replaced(x, value, "replace_value(x, value)", ("x", "value"), VALUE_OF)


@public
def straight_through(
    forward: Callable[P, T], backward: Callable[..., Any] | None = None
) -> Callable[P, T]:
    """Compose the value of one function with the derivative of another.

    Forward: forward(*xs), bit for bit; an int or bool result becomes a float.
    Backward: that of backward(*xs), in both modes and to every order. What `backward`
    closes over learns; what `forward` closes over does not.

    Args:
      forward: any function, differentiable or not.
      backward: a function of the same arguments with a result of the same structure and
        shapes; the first argument, if not given.

    Returns:
      A function of forward's arguments.

    Raises:
      TypeError, ValueError: the two results do not fit; as `replace_value`.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> hard = sg.straight_through(jnp.sign, jnp.tanh)
        >>> print(hard(0.5), f"{jax.grad(hard)(0.5):.4f}")
        1.0 0.7864

    Reference:
      Bengio, Leonard and Courville (2013), "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation".
    """
    require_function(forward, "straight_through", "forward")
    if backward is not None:
        require_function(backward, "straight_through", "backward")
    called = f"straight_through({function_name(forward)}"
    called += f", {function_name(backward)})" if backward else ")"
    value_of: Callable[..., Any] = forward

    @public
    @functools.wraps(forward)
    def composed(*xs: P.args, **kwargs: P.kwargs) -> Any:
        # Without `backward` the derivative is that of the identity.
        if backward is not None:
            source, name = backward(*xs, **kwargs), "backward's result"
        elif xs:
            source, name = xs[0], "the first argument"
        else:
            raise wrong(
                TypeError,
                called,
                "a positional argument, to take the derivative from",
                "none",
                "sg.straight_through(forward, backward)",
            )
        value = value_of(*_stopped(xs), **_stopped(kwargs))
        names = (name, "forward's result")
        return _replaced(source, value, called, names, VALUE_OF_FORWARD)

    return composed


@public
def with_backward(fun: Callable[P, T], backward: Callable[..., Any]) -> Callable[P, T]:
    """Give a function another backward pass.

    `jax.custom_vjp` without its traps: trees, ints, strings and keywords among the
    arguments, closures over traced values, and a right second derivative.

    Forward: fun(*args).
    Backward: backward(cotangent, out, *args); reverse mode only, to every order. The
    derivative of that result treats `out` as fun's result, with this same backward.

    Args:
      fun: any function. A value it closes over must not be differentiated by: pass it
        as an argument.
      backward: a function of the cotangent (a tree like `out`, None where that carries
        no gradient), fun's result and the arguments that fun was called with (keywords
        at their positions, keyword-only ones as keywords). It returns a tuple with one
        cotangent for each: a tree like the argument, or None where nothing flows. It is
        traced when the function is called.

    Returns:
      A function with fun's signature.

    Raises:
      TypeError: backward returns another number, structure, shape or dtype; or, when a
        derivative is taken in forward mode.
      ValueError: a derivative is taken by a value that `fun` closes over.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def backward(ct, out, x):
        ...     return (ct * jax.nn.sigmoid(x),)
        >>> log1pexp = sg.with_backward(lambda x: jnp.log1p(jnp.exp(x)), backward)
        >>> print(jax.grad(log1pexp)(100.0), jax.grad(jax.grad(log1pexp))(0.0))
        1.0 0.25

    Reference:
      TensorFlow's `tf.custom_gradient`.
    """
    require_function(fun, "with_backward")
    require_function(backward, "with_backward", "backward")
    called = f"with_backward({function_name(fun)}, {function_name(backward)})"
    call: Callable[..., Any] = fun

    @public
    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        positional, keywords = _by_position(fun, args, kwargs)
        # Keyword-only arguments are not stopped: a derivative by one must be refused.
        stopped = _stopped(positional, handed)
        out = call(*stopped, **keywords)
        if not keywords:
            names = (f"x{k}" for k in range(len(positional)))
            require_call(backward, ("ct", "out", *names), called)
        name = function_name(fun)
        return attached(out, positional, keywords, backward, called, name)

    return wrapped


def _replaced(
    x: Any, value: Any, called: str, names: tuple[str, str], rule: Rule
) -> Any:
    """Put a tree of values in place of another, leaf by leaf, under a rule."""
    leaves, structure = jax.tree.flatten(x)
    require_gradient(leaves, called)
    expected = f"{names[1]} has the structure of {names[0]}"
    write = "jax.tree.map(forward, tree)"
    require_same_tree(value, x, called, expected, write, ValueError)
    out = []
    for leaf, new in zip(leaves, jax.tree.leaves(value), strict=True):
        if not _jax.carries_gradient(leaf):
            out.append(new)
            continue
        source = jnp.asarray(leaf)
        out += gate([_fitting(new, source, called, names)], [source], (), rule)
    return structure.unflatten(out)


def _fitting(new: Any, source: jax.Array, called: str, names: Any) -> jax.Array:
    """Return a value that can stand for another, or refuse its shape or dtype."""
    value = jnp.asarray(new)
    if value.shape != source.shape:
        raise wrong(
            ValueError,
            called,
            f"{names[1]} has the shape of {names[0]}, {type_of(source)}",
            type_of(value),
            f"jnp.broadcast_to(value, {source.shape})"
            if value.ndim < source.ndim
            else "a `backward` with a result of that shape",
        )
    exact = not jnp.issubdtype(value.dtype, jnp.inexact)
    weak = getattr(value, "weak_type", False)
    real = jnp.iscomplexobj(source) or not jnp.iscomplexobj(value)
    if exact or (weak and real):
        return _jax.sharded_like(value.astype(source.dtype), source)
    if value.dtype != source.dtype:
        raise wrong(
            TypeError,
            called,
            f"{names[1]} has the dtype of {names[0]}, {type_of(source)}",
            type_of(value),
            f"value.astype({str(source.dtype)!r})",
        )
    return _jax.sharded_like(value, source)


def _stopped(tree: Any, stop: Callable[..., Any] = jax.lax.stop_gradient) -> Any:
    return jax.tree.map(lambda x: stop(x) if _jax.carries_gradient(x) else x, tree)


def _by_position(fun: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Bring keywords to their positions; defaults only where one comes before them."""
    if not kwargs:
        return args, kwargs
    try:
        bound = inspect.signature(fun).bind(*args, **kwargs)
    except ValueError:  # a builtin that cannot be asked
        return args, kwargs
    given = dict(bound.arguments)
    bound.apply_defaults()
    for name in reversed(bound.signature.parameters):
        if name not in given:
            bound.arguments.pop(name)
        elif bound.signature.parameters[name].kind not in _ONLY_KEYWORDS:
            break
    return bound.args, bound.kwargs


_ONLY_KEYWORDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
