"""Compare derivatives with differences, for functions with stops, gates and rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, ParamSpec

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.check as _words
from stopgrad_jax._checks import require_function
from stopgrad_jax._edge import Check, public
from stopgrad_jax._errors import function_name, quoted, type_of, wrong
from stopgrad_jax._jax.errors import is_of_a_closure
from stopgrad_jax._program.trace import Traced, require_known, trace

from .checked import Checked
from .compare import DISTANCES
from .second import compare_second

P = ParamSpec("P")


@public
def check_gradients(
    fun: Callable[P, Any],
    *,
    order: Literal[1, 2] = 1,
    modes: Sequence[Literal["rev", "fwd"]] = ("rev",),
    tol: float | None = None,
    allow: Collection[str] = (),
) -> Check[P]:
    """Check a function's derivatives by finite differences that know what is declared.

    Ordinary checkers fail at every stop and every straight-through. This one takes the
    differences of what the function *declares*: a stopped value is held fixed, a
    straight-through value moves as its surrogate, a linear gate by its factor. Gates
    that are not linear (clip, norm, transform, nonfinite) are left out on both sides.
    So are entries of the result that are not finite at the point, as of masked logits.

    Forward: `fun` is run near its arguments.
    Backward: `fun`'s, in each of the `modes`.

    Args:
      fun: any function that JAX can trace.
      order: 1; or 2 to check the derivative of the gradient as well.
      modes: "rev" (`jax.vjp`) and "fwd" (`jax.jvp`).
      tol: the largest relative error, for all leaves alike: by default 1e-6 if every
        leaf that carries a gradient is float64, and 1e-3 if one of them is float32;
        what the differences themselves are unsure of is allowed for on top.
      allow: names of functions whose custom rule differs from them on purpose. The rule
        is followed there. ("with_backward" stands for all calls of that.) Every other
        custom_jvp, custom_vjp and `sg.with_backward` is compared with its own forward,
        but for those of JAX and of this library.

    Returns:
      A check to be called with `fun`'s arguments (one that never is warns): concrete
      arrays of float32 or float64 at leaves that carry a gradient; all others are left
      alone.

    Raises:
      AssertionError: a derivative is wrong; names the leaf or the function, and both
        numbers, and says so where the point is at a kink. Or a rule returns another
        value than its function, at which what comes after it is differentiated. Or it
        cannot be told: at the border of a domain, so near a kink that differences see
        both of its sides, where they settle nothing, or where no entry of the result is
        finite. Its attributes `direction` and `weights` are arrays, where the numbers
        are along a direction of a leaf, or of a weighed sum of the results. At second
        order of more than one number `first_directions` holds an array for each leaf
        that carries a gradient: the numbers are how the slope along these changes.
      ValueError: an unknown mode, order or name in `allow`.
      TypeError: there is nothing to differentiate, or it is traced, complex or narrow;
        or forward mode of a function that has none.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.straight_through(jnp.round)(x) * jnp.sin(x))
        >>> sg.check_gradients(f, order=2)(jnp.array([0.3, 1.7]))
        >>> wrong = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.sin(x),))
        >>> sg.check_gradients(wrong)(0.5)
        Traceback (most recent call last):
            ...
        AssertionError: check_gradients(sin): the rule of with_backward(sin)...
    """
    require_function(fun, "check_gradients")
    called = f"check_gradients({function_name(fun)})"
    _require_options(order, modes, called)

    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        traced = trace(fun, args, kwargs)
        places = dict(_places(traced, called))
        require_known([*traced.leaves, *traced.consts], called, "check_gradients")
        # A string is a collection as well, of its letters: one name is meant.
        names = (allow,) if isinstance(allow, str) else tuple(allow)
        checked = Checked(traced, places, names, called, tol)
        with _errors_explained(checked, "fwd" in modes):
            # In this order: rules are compared where all is finite, and the leaves in
            # the reading that the rules turn out to ask for.
            checked.leave_out_nonfinite()
            checked.take_steep_apart(modes[0])
            checked.compare_rules(forward="rev" not in modes)
            for mode in modes:
                checked.compare(mode)
                if order == 2:
                    compare_second(checked, mode)

    return Check(fun, called, public(check))


@contextlib.contextmanager
def _errors_explained(checked: Checked, forward: bool) -> Iterator[None]:
    """Add to what a rule raises what it has to do with this call."""
    try:
        yield
    except Exception as error:
        if is_of_a_closure(error):
            closing = checked.closing()
            if not closing:
                raise
            expected, came, instead = _words.CLOSED_RULE
            names = {"name": checked.name, "rule": closing[0]}
            said = (text.format(**names) for text in (expected, came, instead))
            raise wrong(TypeError, checked.called, *said) from error
        # What this check raises begins with its call; all else came out of the
        # function.
        ours = str(error).startswith(checked.called)
        no_rule = forward and isinstance(error, TypeError) and "forward" in str(error)
        if no_rule and not ours:
            raise checked.no_forward_mode() from error
        if not ours and len(checked.places) > 1:
            leaves = quoted(checked.places.values())
            error.add_note(
                _words.BY_EVERY_LEAF.format(called=checked.called, leaves=leaves)
            )
        raise


def _places(traced: Traced, called: str) -> Iterator[tuple[int, str]]:
    """Number and address of each leaf to differentiate by."""
    found, paths = False, traced.paths()
    for k, path in sorted(paths.items()):
        leaf = traced.leaves[k]
        if not _jax.carries_gradient(leaf):
            continue
        found = True
        dtype = jnp.dtype(leaf.dtype)
        known = isinstance(leaf, jax.Array)
        if not known or dtype.kind != "f" or dtype.itemsize not in DISTANCES:
            raise wrong(
                TypeError,
                called,
                "known arrays of float32 or float64",
                f'a {"" if known else "shape only, "}{type_of(leaf)} at "{path}"',
                "fun of real arrays, as lambda re, im: fun(re + 1j * im)"
                if dtype.kind == "c"
                else "x.astype(jnp.float32): narrow floats have no useful differences"
                if known
                else "an array",
            )
        yield k, path
    if not found:
        raise wrong(
            TypeError,
            called,
            "an argument that carries a gradient",
            quoted(paths.values()),
            "an argument of floats",
        )


def _require_options(order: int, modes: Sequence[str], called: str) -> None:
    if order not in (1, 2):
        raise wrong(ValueError, called, "order is 1 or 2", f"{order!r}", "order=2")
    unknown = [m for m in modes if m not in ("rev", "fwd")]
    if isinstance(modes, str) or unknown or not modes:
        expected = 'modes are "rev", "fwd" or both'
        instead = 'modes=("rev", "fwd")'
        raise wrong(ValueError, called, expected, f"{modes!r}", instead)
