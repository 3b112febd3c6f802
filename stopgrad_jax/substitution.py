"""Substitution: the value of one thing, the derivative of another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from ._address import leaves_like
from ._engine.gate import Rule, gate, program
from ._engine.gated import require_gradient
from ._errors import beats, function_name, type_of

__all__ = ["replace_value", "straight_through", "with_backward"]

P = ParamSpec("P")
T = TypeVar("T")


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
    return _replaced(x, value, "replace_value(x, value)", ("x", "value"))


def straight_through(
    forward: Callable[..., Any], backward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
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
    called = f"straight_through({function_name(forward)}"
    called += f", {function_name(backward)})" if backward else ")"

    @functools.wraps(forward)
    def composed(*xs: Any, **kwargs: Any) -> Any:
        if backward is not None:
            source, name = backward(*xs, **kwargs), "backward's result"
        elif xs:
            source, name = xs[0], "the first argument"
        else:
            raise TypeError(
                beats(
                    called,
                    "a positional argument, to take the derivative from",
                    "none",
                    "sg.straight_through(forward, backward)",
                )
            )
        value = forward(*_stopped(xs), **_stopped(kwargs))
        return _replaced(source, value, called, (name, "forward's result"))

    return composed


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
    called = f"with_backward({function_name(fun)}, {function_name(backward)})"
    call: Callable[..., Any] = fun

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        positional, keywords = _by_position(fun, args, kwargs)
        # Keyword-only arguments are not stopped: a derivative by one must be refused.
        out = call(*_stopped(positional), **keywords)
        return _attached(out, positional, keywords, backward, called)

    return wrapped


def _replaced(x: Any, value: Any, called: str, names: tuple[str, str]) -> Any:
    leaves, structure = jax.tree.flatten(x)
    require_gradient(leaves, called)
    if jax.tree.structure(value) != structure:
        raise ValueError(
            beats(
                called,
                f"{names[1]} has the structure of {names[0]}, {structure}",
                str(jax.tree.structure(value)),
                "jax.tree.map(forward, tree)",
            )
        )
    out = []
    for leaf, new in zip(leaves, jax.tree.leaves(value), strict=True):
        if not _jax.carries_gradient(leaf):
            out.append(new)
            continue
        source = jnp.asarray(leaf)
        out += gate([_fitting(new, source, called, names)], [source], (), _VALUE_OF)
    return structure.unflatten(out)


def _fitting(new: Any, source: jax.Array, called: str, names: Any) -> jax.Array:
    value = jnp.asarray(new)
    if value.shape != source.shape:
        raise ValueError(
            beats(
                called,
                f"{names[1]} has the shape of {names[0]}, {type_of(source)}",
                type_of(value),
                f"jnp.broadcast_to(value, {source.shape})"
                if value.ndim < source.ndim
                else "a `backward` with a result of that shape",
            )
        )
    exact = not jnp.issubdtype(value.dtype, jnp.inexact)
    weak = getattr(value, "weak_type", False)
    real = jnp.iscomplexobj(source) or not jnp.iscomplexobj(value)
    if exact or (weak and real):
        return _jax.sharded_like(value.astype(source.dtype), source)
    if value.dtype != source.dtype:
        raise TypeError(
            beats(
                called,
                f"{names[1]} has the dtype of {names[0]}, {type_of(source)}",
                type_of(value),
                f"value.astype({str(source.dtype)!r})",
            )
        )
    return _jax.sharded_like(value, source)


def _stopped(tree: Any) -> Any:
    def stop(leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if _jax.carries_gradient(leaf) else leaf

    return jax.tree.map(stop, tree)


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


def _attached(
    out: Any, args: tuple, keywords: dict, backward: Callable[..., Any], called: str
) -> Any:
    """Return `out` with the derivative that `backward` gives it, by the arguments."""
    leaves, structure = jax.tree.flatten(out)
    require_gradient(leaves, f"{called}: the result")
    learns = [_jax.carries_gradient(x) for x in leaves]
    values = [jnp.asarray(x) for x, c in zip(leaves, learns, strict=True) if c]
    # All that the backward pass reads and that may be traced is handed to the gate.
    known, read = jax.tree.flatten((args, keywords, leaves))
    is_array = [_jax.carries_gradient(x) or isinstance(x, jax.Array) for x in known]
    arrays = [jnp.asarray(x) for x, a in zip(known, is_array, strict=True) if a]
    connected: list[int] = []  # which leaves of the arguments get a cotangent

    def flat(*operands: Any) -> list[Any]:
        results = iter(operands[: len(values)])
        given = iter(operands[len(values) : -len(values)])
        cts = iter(operands[-len(values) :])
        filled = [next(given) if a else x for x, a in zip(known, is_array, strict=True)]
        args, keywords, old = read.unflatten(filled)
        new = [next(results) if c else x for x, c in zip(old, learns, strict=True)]
        ct = structure.unflatten([next(cts) if c else None for c in learns])
        pulled = backward(ct, structure.unflatten(new), *args, **keywords)
        pairs = list(enumerate(_cotangents(pulled, args, called)))
        connected[:] = [k for k, ct in pairs if ct is not None]
        return [ct for _, ct in pairs if ct is not None]

    pull, closed_over = program(flat, *values, *arrays, *values)
    rule = Rule(
        "with_backward",
        pull,
        reads_values=True,
        typed=True,
        forward=_no_forward_mode(called),
        only_sources=_closed_over(called),
    )
    flat_args = jax.tree.leaves(args)
    sources = [jnp.asarray(flat_args[k]) for k in connected]
    results = iter(gate(values, sources, [*arrays, *closed_over], rule))
    pairs = zip(leaves, learns, strict=True)
    return structure.unflatten([next(results) if c else x for x, c in pairs])


def _cotangents(pulled: Any, args: tuple, called: str) -> list[Any]:
    """Check what a backward pass returned: a cotangent or None for each leaf."""
    if not isinstance(pulled, tuple | list) or len(pulled) != len(args):
        came = _kind(pulled)
        raise TypeError(
            beats(
                called,
                f"backward returns a tuple of {len(args)}, one for each argument",
                came,
                f"return ({', '.join(['ct', 'None', 'None'][: len(args)])},)",
            )
        )
    out = []
    for number, (ct, arg) in enumerate(zip(pulled, args, strict=True)):
        try:
            cts = leaves_like(ct, arg)
        except ValueError:
            raise TypeError(
                beats(
                    called,
                    f"the cotangent of argument {number} is a tree like it, "
                    f"{jax.tree.structure(arg)}, with None where nothing flows",
                    str(jax.tree.structure(ct)),
                    "jax.tree.map(..., argument), or None for the whole",
                )
            ) from None
        pairs = zip(cts, jax.tree.leaves(arg), strict=True)
        out += [_cotangent(c, leaf, number, called) for c, leaf in pairs]
    return out


def _cotangent(ct: Any, leaf: Any, number: int, called: str) -> Any:
    if ct is None or getattr(ct, "dtype", None) == jax.dtypes.float0:
        return None
    if not _jax.carries_gradient(leaf):
        raise TypeError(
            beats(
                called,
                f"None for a leaf of argument {number} that carries no gradient",
                f"{ct!r:.60}",
                "None",
            )
        )
    ct, leaf = jnp.asarray(ct), jnp.asarray(leaf)
    real = jnp.iscomplexobj(leaf) or not jnp.iscomplexobj(ct)
    if getattr(ct, "weak_type", False) and real:
        ct = ct.astype(leaf.dtype)
    if (ct.shape, ct.dtype) != (leaf.shape, leaf.dtype):
        raise TypeError(
            beats(
                called,
                f"the cotangent of argument {number} is {type_of(leaf)}, as its value",
                type_of(ct),
                f"ct.astype({str(leaf.dtype)!r})"
                if ct.shape == leaf.shape
                else f"a cotangent of shape {leaf.shape}",
            )
        )
    return ct


def _kind(pulled: Any) -> str:
    if isinstance(pulled, tuple | list):
        return f"{len(pulled)}"
    return type_of(pulled) if hasattr(pulled, "dtype") else type(pulled).__name__


def _no_forward_mode(called: str) -> str:
    return beats(
        called,
        "reverse mode: it has a backward pass and no forward one",
        "forward mode (jvp, jacfwd, linearize called, or a Hessian by forward over "
        "reverse)",
        "jax.vjp, jax.grad, jax.jacrev, jax.jacrev of jax.grad; or jax.custom_jvp",
    )


def _closed_over(called: str) -> str:
    return beats(
        called,
        "a derivative by its arguments",
        "one by a value that the function closes over (or takes by keyword only), "
        "for which its backward pass has no cotangent",
        "that value as a positional argument, or sg.stop_gradient of it",
    )


def _value_of(cts: Any, parameters: Any) -> Any:
    return cts


_VALUE_OF = Rule("replace_value", _value_of, linear=True)
