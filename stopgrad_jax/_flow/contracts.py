"""One-line contracts for test-suites: where gradients must flow, and where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, overload

import stopgrad_jax._words.flow as _words
from stopgrad_jax._address import Address
from stopgrad_jax._checks import require_function, shown
from stopgrad_jax._edge import Check, public
from stopgrad_jax._errors import function_name, quoted, wrong
from stopgrad_jax._page import page
from stopgrad_jax._program.lookup import addresses_in
from stopgrad_jax._program.trace import trace
from stopgrad_jax._source.labels import Labels

from .analysis import Look, require_outputs
from .explain import cuts_of, explain, said
from .flow import looked_at
from .inputs import Folded

P = ParamSpec("P")


@overload
def assert_gradient(
    fun: Callable[P, Any], xs: Any, ys: Any = None
) -> Callable[P, None]: ...


@overload
def assert_gradient(
    fun: Callable[..., Any],
    xs: Any,
    ys: Any = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None: ...


@public
def assert_gradient(
    fun: Callable[..., Any],
    xs: Any,
    ys: Any = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Assert that a gradient can reach every float leaf of some inputs.

    For a test-suite: `sg.assert_gradient(loss, "params/codebook")(params, x)` fails in
    the commit that stops its gradient by mistake, and says at which line. Nothing is
    run, so a gradient that happens to be zero passes.

    Forward: not evaluated.
    Backward: not evaluated.

    Args:
      fun: any function that JAX can trace.
      xs: an address or several.
      ys: addresses of what is differentiated; `fun`'s output if it is one array.
      args: `fun`'s arguments, to check it at once; a tuple.
      kwargs: its arguments by keyword, likewise.

    Returns:
      A function of `fun`'s arguments (arrays or `jax.ShapeDtypeStruct`), to be called:
      it warns if it never is. None, if `args` or `kwargs` are given.

    Raises:
      AssertionError: a leaf gets no gradient; lists each, and explains.
      AddressError: an address matches nothing.
      TypeError: `fun` returns several arrays and `ys` does not say which; or nothing
        in `xs` carries a gradient.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def loss(w, b):
        ...     return jnp.sum((jnp.round(w) + b) ** 2)
        >>> sg.assert_gradient(loss, "b")(2.0, 1.0)
        >>> sg.assert_gradient(loss, "b", args=(2.0, 1.0))
        >>> sg.assert_gradient(loss, "w")(2.0, 1.0)
        Traceback (most recent call last):
            ...
        AssertionError: assert_gradient(loss, 'w')
        w: expected a gradient, structurally zero ...
    """
    contract = _contract(fun, xs, ys, "assert_gradient", _without)
    return _asked(contract, args, kwargs)


@overload
def assert_no_gradient(
    fun: Callable[P, Any], xs: Any, ys: Any = None
) -> Callable[P, None]: ...


@overload
def assert_no_gradient(
    fun: Callable[..., Any],
    xs: Any,
    ys: Any = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None: ...


@public
def assert_no_gradient(
    fun: Callable[..., Any],
    xs: Any,
    ys: Any = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Assert that no gradient can reach any leaf of some inputs.

    For targets, teachers and baselines: what must not learn from this loss.

    Forward: not evaluated.
    Backward: not evaluated.

    Args:
      fun: any function that JAX can trace.
      xs: an address or several.
      ys: addresses of what is differentiated; `fun`'s output if it is one array.
      args: `fun`'s arguments, to check it at once; a tuple.
      kwargs: its arguments by keyword, likewise.

    Returns:
      A function of `fun`'s arguments (arrays or `jax.ShapeDtypeStruct`), to be called:
      it warns if it never is. None, if `args` or `kwargs` are given.

    Raises:
      AssertionError: a leaf can get a gradient; lists each, and the way it takes.
      AddressError: an address matches nothing.
      TypeError: `fun` returns several arrays and `ys` does not say which.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> def loss(w, target):
        ...     return (w - jax.lax.stop_gradient(target)) ** 2
        >>> sg.assert_no_gradient(loss, "target")(2.0, 1.0)
        >>> sg.assert_no_gradient(loss, "w")(2.0, 1.0)
        Traceback (most recent call last):
            ...
        AssertionError: assert_no_gradient(loss, 'w')
        w: expected none, can get a gradient ...
    """
    contract = _contract(fun, xs, ys, "assert_no_gradient", _with)
    return _asked(contract, args, kwargs)


def _contract(
    fun: Callable[P, Any],
    xs: Any,
    ys: Any,
    name: str,
    broken: Callable[[Look], list[tuple[Folded, str]]],
) -> Check[P]:
    require_function(fun, name)
    named = "" if ys is None else f", ys={shown(ys)}"
    called = f"{name}({function_name(fun)}, {shown(xs)}{named})"
    wanted = addresses_in(xs, called, "xs")
    asked = None if ys is None else addresses_in(ys, called, "ys")

    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        traced, labels = trace(fun, args, kwargs), Labels(fun)
        look = looked_at(traced, labels, wanted, asked, called)
        require_outputs(look)
        _require_one_output(look, called, asked)
        _require_leaves(look, called, wanted)
        if broken(look):
            # A contract that holds needs one look; one that is broken is explained in
            # the terms that the whole function has.
            whole = looked_at(traced, labels, None, asked, called)
            look = looked_at(traced, labels, wanted, asked, called, base=whole)
            rows = broken(look)
            lines = [f"{r.path}: {expected}{_because(look, r)}" for r, expected in rows]
            told = [row for row, _ in rows]
            text = page(explain(look, told, cuts=broken is _without)).plain
            if broken is _with:  # one that was meant to stop it, perhaps
                lines += [f"{s.place}: {s.expression}: {w}" for s, w in look.dropped]
            raise AssertionError("\n".join([called, *lines, "", text]))

    return Check(fun, called, public(check))


def _asked(contract: Check[Any], args: Any, kwargs: Any) -> Any:
    """Call a contract whose arguments are there; else hand it out."""
    if args is None and kwargs is None:
        return contract
    if not isinstance(args, tuple | list | None):
        # It is not to warn that it was never called.
        contract.drop()
        called = f"{function_name(contract)}: args={shown(args)}"
        expected = "args is a tuple of the function's arguments"
        raise wrong(TypeError, called, expected, type(args).__name__, "args=(w, x)")
    contract(*(args or ()), **(kwargs or {}))
    return None


def _without(look: Look) -> list[tuple[Folded, str]]:
    """The rows that get no gradient, and what was expected of them."""
    rows = [r for r in look.asked if r.bits and look.verdict(r.bits) != "flows"]
    raises = _words.EXPECTED_SOME_RAISES
    words = {"unknown": raises}
    return [(r, words.get(look.verdict(r.bits), _words.EXPECTED_SOME)) for r in rows]


def _with(look: Look) -> list[tuple[Folded, str]]:
    """The rows that get a gradient, and what was expected of them."""
    words = {
        "flows": _words.EXPECTED_NONE,
        "unknown": _words.EXPECTED_NONE_RAISES,
    }
    pairs = [(r, words.get(look.verdict(r.bits), "")) for r in look.asked if r.bits]
    return [(row, expected) for row, expected in pairs if expected]


def _because(look: Look, row: Folded) -> str:
    word = look.verdict(row.bits)
    if word == "cut":
        cuts = dict.fromkeys(f"{c.told}: {c.places}" for c in cuts_of(look, row))
        return f" ({'; '.join(cuts)})" if cuts else ""
    if word == "unused":
        return f" ({_words.NOT_COMPUTED})"
    if word == "unknown":
        return f"; {said(look, row)}"
    return ""


def _require_one_output(look: Look, called: str, ys: Sequence[Address] | None) -> None:
    names = [name for name, _ in look.outputs]
    if ys is None and len(names) > 1:
        raise wrong(
            TypeError,
            called,
            f"{look.traced.name} must return one array, or ys must say which",
            f"{len(names)} arrays: {quoted(names)}",
            f'ys="{names[0]}" for one, ys="return" for all',
        )


def _require_leaves(look: Look, called: str, xs: Sequence[Address]) -> None:
    if not any(row.bits for row in look.asked):
        kinds = {str(leaf.aval.dtype) for row in look.asked for leaf in row.leaves}
        raise wrong(
            TypeError,
            called,
            "xs must hold a value that carries a gradient",
            f"{quoted(xs)}, which has {', '.join(sorted(kinds)) or 'no array'}",
            "the address of a float",
        )
