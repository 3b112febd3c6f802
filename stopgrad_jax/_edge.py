"""The public edge: an error is shown at the user's line, without what lies between.

`STOPGRAD_TRACEBACK=full` in the environment shows all of it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast

import stopgrad_jax._jax as _jax

from ._errors import AddressError, beats, has_beats
from ._words.flow import NEVER_CALLED

P = ParamSpec("P")
R = TypeVar("R")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Hide this package's own frames from errors that leave a function."""
    at_edge = _at_edge

    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            at_edge(error, function)
            raise  # as it is: a bare `raise` adds no frame to the traceback

    # With the globals of the function's own module: doctest looks for its examples by
    # them, and would pass over a function of this module.
    own = cast(types.FunctionType, called)
    space = getattr(function, "__globals__", own.__globals__)
    own = types.FunctionType(own.__code__, space, closure=own.__closure__)
    return functools.wraps(function)(own)


def _at_edge(error: Exception, function: Callable[..., Any]) -> None:
    entries = list(_entries(error.__traceback__))
    if isinstance(error, TypeError) and len(entries) == 1:  # it could not be called
        error.args = (_bad_call(function, str(error)),)
    if os.environ.get("STOPGRAD_TRACEBACK") == "full":
        return
    ours = has_beats(error) or isinstance(error, AddressError | AssertionError)
    if not ours and _jax.is_of_package(_file(entries[-1])):
        return  # a fault of this package's own: nothing of it is hidden
    if ours:  # what it was made of is in its words
        error.__cause__, error.__suppress_context__ = None, True
    hidden = _jax.is_own if ours else _jax.is_of_package
    rest = None
    for entry in reversed(entries):
        if not hidden(_file(entry)):
            place = entry.tb_frame, entry.tb_lasti, entry.tb_lineno
            rest = types.TracebackType(rest, *place)
    error.__traceback__ = rest


def _entries(traceback: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _file(entry: types.TracebackType) -> str:
    return entry.tb_frame.f_code.co_filename


def _bad_call(function: Callable[..., Any], message: str) -> str:
    """Say how a function is called, of which Python says that it was called wrongly."""
    name = function.__name__
    parameters = inspect.signature(function).parameters
    shown = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    wrong = message.rpartition("keyword argument ")[2].strip("'")
    arguments = [
        f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name
        for p in parameters.values()
        if p.kind is not p.VAR_KEYWORD
        and ("missing" not in message or p.default is p.empty)
    ]
    write = f"{name}({', '.join(arguments)})"
    if wrong in ("argnums", "argnames", "wrt") and "xs" in parameters:
        write = f'{name}(fun, 0) by position or {name}(fun, "w") by name, for {wrong}'
    elif near := difflib.get_close_matches(wrong, shown, n=1):
        write = f"{name}(..., {near[0]}=...)"
    elif "missing" in message and "'xs'" in message:
        write = f'{name}(fun, "w") for the argument of that name'
    got = message.removeprefix(f"{function.__qualname__}() ")
    return beats(f"{name}(...)", f"parameters {', '.join(shown)}", got, write)


def warn(message: str) -> None:
    """Warn at the line of the user's that is running, however deep this is called."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and _jax.is_own(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)


# Checks that are called later -----------------------------------------------------


class Check(Generic[P]):
    """A check that is made, and has yet to be called with the function's arguments.

    Like a coroutine that is never awaited, one that is never called warns. As with a
    function, a copy is the same one, and in a class it is a method.
    """

    def __init__(self, fun: Callable[P, Any], called: str, check: Callable[P, None]):
        """Wait for the arguments."""
        self._asked = False
        functools.update_wrapper(self, fun, updated=())
        self._called, self._check, self._line = called, check, _jax.line_here()

    @public
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Check the function at these arguments."""
        self._asked = True
        self._check(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a function does: a call of the method is a call of this."""
        return self if instance is None else types.MethodType(self, instance)

    def __copy__(self) -> Check[P]:
        """Return this: a call of a copy is its call."""
        return self

    def __deepcopy__(self, memo: Any) -> Check[P]:
        """Return this, likewise."""
        return self

    def drop(self) -> None:
        """Give it up: what it was made for has failed."""
        self._asked = True

    def __repr__(self) -> str:
        """Say what it is and that it waits."""
        return f"<{self._called}: to be called with the function's arguments>"

    def __del__(self) -> None:
        """Warn if it was thrown away without a call."""
        if not self._asked:
            words = NEVER_CALLED.format(called=self._called)
            at = f" (made at {self._line})" if self._line else ""
            with contextlib.suppress(TypeError, AttributeError):  # Python is ending
                warnings.warn(f"{words}{at}", RuntimeWarning, stacklevel=2)
