"""What the variables of the user's functions were given while JAX traced them.

The text of a program tells which equations a statement made, and not always which of
their results it kept. So functions are watched while they run: a change of a variable
from one line to the next is an assignment by the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

import stopgrad_jax._jax as _jax


@dataclasses.dataclass(frozen=True)
class Seen:
    """A variable of a function was given an array at a line."""

    file: str
    name: str
    line: int
    variable: Any  # that it is in the program


class Watch:
    """Notes what the variables of functions are given, but for those of JAX.

    No value and no frame is kept: `jax.checking_leaks` counts those that are.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.seen: list[Seen] = []
        self._names = names
        self._running: dict[int, tuple[int, dict[str, Any]]] = {}

    def is_of_interest(self, code: types.CodeType) -> bool:
        """Tell a function, not of JAX, that has a variable of these names."""
        variables = code.co_varnames + code.co_cellvars + code.co_freevars
        names = self._names.intersection(variables)
        is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
        return bool(names) and is_function and not _jax.is_own(code.co_filename)

    def begins(self, frame: types.FrameType) -> None:
        """Note what a function was handed: that is no assignment."""
        self._note(frame)

    def goes_on(self, frame: types.FrameType) -> None:
        """Compare with the line before: a new one begins, or the function ends."""
        line, before = self._running.get(id(frame), (0, {}))
        self._note(frame)
        for name, variable in self._running[id(frame)][1].items():
            if before.get(name) is not variable is not None:
                file = frame.f_code.co_filename
                self.seen.append(Seen(file, name, line, variable))

    def _note(self, frame: types.FrameType) -> None:
        values = frame.f_locals
        known = {n: _variable(values[n]) for n in self._names if n in values}
        self._running[id(frame)] = frame.f_lineno, known


def _variable(value: Any) -> Any:
    """Return what a value is in the program; no code of its own is run."""
    return _jax.variable_under(value) if _jax.is_tracer(value) else None


@contextlib.contextmanager
def watching(names: frozenset[str]) -> Iterator[Watch]:
    """Watch the functions that have variables of these names, as far as Python lets us.

    JAX runs those anew that it has traced before, too.
    """
    watch = Watch(names)
    listening = _monitored if sys.version_info >= (3, 12) else _traced
    with _ANEW(object()), listening(watch):
        yield watch


_ANEW = jax.make_user_context()


@contextlib.contextmanager
def _monitored(watch: Watch) -> Iterator[None]:
    monitoring = sys.monitoring
    events = monitoring.events
    free = (k for k in range(6) if monitoring.get_tool(k) is None)
    tool = next(free, None)
    if tool is None:  # a debugger, a profiler and others have them all
        yield
        return

    def starts(code: types.CodeType, _: int) -> Any:
        if not watch.is_of_interest(code):
            return monitoring.DISABLE
        monitoring.set_local_events(tool, code, sum(every))
        codes.append(code)
        return watch.begins(_caller(inspect.currentframe()))

    def goes_on(*_: Any) -> None:
        watch.goes_on(_caller(inspect.currentframe()))

    codes = list[types.CodeType]()
    # A jump back on one line begins no line anew.
    every = (events.LINE, events.JUMP, events.PY_RETURN, events.PY_YIELD)
    monitoring.use_tool_id(tool, "stopgrad_jax")
    try:
        # What another watch has turned off is not asked again, if it is not said.
        monitoring.restart_events()
        monitoring.register_callback(tool, events.PY_START, starts)
        for event in every:
            monitoring.register_callback(tool, event, goes_on)
        monitoring.set_events(tool, events.PY_START)
        yield
    finally:
        for code in codes:
            monitoring.set_local_events(tool, code, events.NO_EVENTS)
        monitoring.set_events(tool, events.NO_EVENTS)
        monitoring.free_tool_id(tool)


def _caller(frame: types.FrameType | None) -> types.FrameType:
    assert frame is not None  # as CPython always has one
    assert frame.f_back is not None
    return frame.f_back


@contextlib.contextmanager
def _traced(watch: Watch) -> Iterator[None]:
    """As Python 3.11 has it; a debugger, or what counts the lines of tests, waits."""

    def starts(frame: types.FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not watch.is_of_interest(frame.f_code):
            return None
        # A generator is called each time that it goes on: `RESUME 1`, not `RESUME 0`.
        resumed = frame.f_code.co_code[frame.f_lasti + 1]
        (watch.goes_on if resumed else watch.begins)(frame)
        return goes_on

    def goes_on(frame: types.FrameType, event: str, _: Any) -> Callable[..., Any]:
        watch.goes_on(frame)
        return goes_on

    before = sys.gettrace()
    sys.settrace(starts)
    try:
        yield
    finally:
        sys.settrace(before)
