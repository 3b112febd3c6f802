"""Where nan and inf are born, forward or backward: at which line, in which step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import jax

import stopgrad_jax._jax.errors as _jax_errors
import stopgrad_jax._words.nonfinite as _words
from stopgrad_jax._checks import require_function
from stopgrad_jax._edge import public
from stopgrad_jax._errors import function_name, wrong
from stopgrad_jax._program.lookup import addresses_in
from stopgrad_jax._program.trace import require_known, trace
from stopgrad_jax._source.labels import Labels

from .levels import Failed
from .programs import Examined, backward, forward
from .raised import raised
from .report import Nonfinite, report
from .search import Finding, search
from .stepper import Stepper

P = ParamSpec("P")


@public
def find_nonfinite(
    fun: Callable[P, Any], xs: Any = None, *, ys: Any = None
) -> Callable[P, Nonfinite | None]:
    """Find the first operation whose nan or inf reaches a result or a gradient.

    `jax.debug_nans` stops at the first nan of all, also where it is masked later, and
    under `jax.jit` of a gradient it has no line. This one works back from what is
    nonfinite in the end.

    Forward: `fun` is run, once compiled; only if something is nonfinite it is run again
    step by step, as far as needed.
    Backward: likewise the gradients by `xs`, if `fun` returns one array or `ys` is
    given. Before one is said to be born there, or nothing found, the operations of
    `fun` are run one by one, as they are without `jax.jit`.

    Args:
      fun: any function that JAX can trace; a training step too, whose gradients are
        then its own.
      xs: addresses of the arguments whose gradients are looked at; the first argument
        that carries one, as in `jax.grad`, if None. `xs=()` looks forward only.
      ys: addresses of what is differentiated, as in `sg.gradients`: outputs, arguments
        or values inside; `fun`'s output if it is one array.

    Returns:
      A function of `fun`'s arguments, concrete arrays. It returns None, or a
      `Nonfinite`: print it. Values that never reach a result are not reported, nor is
      an infinity that is put in on purpose (a literal, an argument), unless an
      operation makes nan of it or nothing else explains the result.

    Raises:
      TypeError: an argument is traced: call it outside of `jax.jit`.
      AddressError: an address matches nothing.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> def loss(w):
        ...     return jnp.where(w > 0, jnp.sqrt(w), 0.0)
        >>> report = sg.find_nonfinite(loss)(0.0)
        >>> print(report.direction, report.expression)
        backward jnp.sqrt(w)
        >>> print(report.hint)
        jnp.where(w > 0, jnp.sqrt(w), 0.0) masks the value and not the derivative...
        >>> print(sg.find_nonfinite(loss)(1.0))
        None
    """
    require_function(fun, "find_nonfinite")
    called = f"find_nonfinite({function_name(fun)})"
    wanted = None if xs is None else addresses_in(xs, called, "xs")
    asked = None if ys is None else addresses_in(ys, called, "ys")

    @public
    @functools.wraps(fun)
    def find_in(*args: P.args, **kwargs: P.kwargs) -> Nonfinite | None:
        require_known(jax.tree.leaves((args, kwargs)), called, "find_nonfinite")
        traced = trace(fun, args, kwargs)
        labels = Labels(fun)
        # JAX's own checks raise at the first nan, also at one that is masked later.
        with jax.debug_nans(False), jax.debug_infs(False):
            value = program = forward(traced)
            found = _search(program, labels, called)
            if found is None and wanted != []:
                program = backward(traced, wanted, asked, called) or program
                found = _search(program, labels, called)
            # XLA may fuse operations to a finite value that are not finite one by one:
            # no gradient is blamed, and nothing found, before that is ruled out.
            later = found is None or found.side == "backward"
            if later and program is not value and value.wrong_by_steps:
                found = search(value, Stepper(labels), by_steps=True)
            elif found is None and program.wrong_by_steps:
                found = search(program, Stepper(labels), by_steps=True)
            return None if found is None else report(found, labels, fun)

    return find_in


def _search(program: Examined, labels: Labels, called: str) -> Finding | None:
    stepper = Stepper(labels)
    try:
        with _jax_errors.quiet_callbacks():  # what raises is told once
            wrong = program.wrong
    except Exception as error:
        raise _of_function(program, stepper, called) or error from None
    try:
        return search(program, stepper) if wrong else None
    except Failed as failed:  # it runs as compiled
        raise _of_operation(failed, called) from failed.error


def _of_operation(failed: Failed, called: str) -> Exception:
    """Return the error for an operation that runs only as a part of its program."""
    spots = failed.op.path.spots
    came = f"{failed.op.eqn.primitive.name} raised by itself"
    came += f"\n          at {spots[-1].place}" if spots else ""
    return wrong(RuntimeError, called, _words.RUNS_APART, came, _words.AS_COMPILED)


def _of_function(program: Examined, stepper: Stepper, called: str) -> Exception | None:
    """Return the error for a function that raises by itself, if it is one that does."""
    with _jax_errors.quiet_callbacks():
        found = raised(stepper, program.jaxpr, program.consts, program.operands)
    if found is None:
        return None
    spot, error = found
    came = _jax_errors.message_of(error)
    if spot is not None:
        came += f"\n          at {spot.place}, in {spot.expression}"
    of_value = program.direction == "forward"
    runs = _words.RUNS.format(what="the function" if of_value else "the gradient")
    call = _words.CALL_IT.format(what="the call" if of_value else "the gradient")
    return wrong(RuntimeError, called, runs, came, call)
