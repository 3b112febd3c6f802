"""What the variables of the user's functions were given while JAX traced them.

The text of a program tells which equations a statement made, and not always which of
their results it kept. So functions are watched while they run: what a variable holds
after each instruction that stores it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import stopgrad_jax._jax as _jax

from .as_written import anew


@dataclasses.dataclass(frozen=True)
class Seen:
    """A variable of a function was given a value at a line.

    `variable` is what it is in the program, None if that is not known; `is_array`: it
    is one of JAX's arrays that are traced.
    """

    file: str
    name: str
    line: int
    variable: Any
    is_array: bool


class Watch:
    """Notes what the variables of functions are given, but for those of JAX.

    No value and no frame is kept: `jax.checking_leaks` counts those that are.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.seen: list[Seen] = []
        self._names = names
        self._stores: dict[types.CodeType, dict[int, list[tuple[str, int]]]] = {}
        self._stored: dict[int, list[tuple[str, int]]] = {}  # by frame, just now

    def is_of_interest(self, code: types.CodeType) -> bool:
        """Tell a function, not of JAX, that stores variables of these names."""
        if not code.co_flags & inspect.CO_OPTIMIZED or _jax.is_own(code.co_filename):
            return False
        variables = code.co_varnames + code.co_cellvars + code.co_freevars
        return bool(self._names.intersection(variables) and self._stores_of(code))

    def begins(self, frame: types.FrameType) -> None:
        """A function begins; another one may have had its frame's place before."""
        self._stored.pop(id(frame), None)

    def goes_on(self, frame: types.FrameType, offset: int) -> None:
        """An instruction is about to run: what the one before stored is there."""
        for name, line in self._stored.pop(id(frame), ()):
            value = frame.f_locals.get(name)
            is_array = _jax.is_tracer(value)
            variable = _jax.variable_under(value) if is_array else None
            file = frame.f_code.co_filename
            self.seen.append(Seen(file, name, line, variable, is_array))
        if stored := self._stores_of(frame.f_code).get(offset):
            self._stored[id(frame)] = stored

    def _stores_of(self, code: types.CodeType) -> dict[int, list[tuple[str, int]]]:
        """Return the variables that instructions store, by offset, and the lines."""
        if code not in self._stores:
            found = self._stores[code] = {}
            for i in dis.get_instructions(code):
                named = i.argval if isinstance(i.argval, tuple) else (i.argval,)
                count = 2 if i.opname == "STORE_FAST_STORE_FAST" else 1
                names = [n for n in named[:count] if n in self._names]
                if names and i.opname in _STORES and i.positions:
                    line = i.positions.lineno or 0
                    found[i.offset] = [(name, line) for name in names]
        return self._stores[code]


_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST")


@contextlib.contextmanager
def watching(names: frozenset[str]) -> Iterator[Watch]:
    """Watch the functions that have variables of these names, as far as Python lets us.

    JAX runs those anew that it has traced before, too.
    """
    watch = Watch(names)
    listening = _monitored if sys.version_info >= (3, 12) else _traced
    with anew(), listening(watch):
        yield watch


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
        monitoring.set_local_events(tool, code, events.INSTRUCTION)
        codes.append(code)
        return watch.begins(_caller(inspect.currentframe()))

    def goes_on(_: types.CodeType, offset: int) -> None:
        watch.goes_on(_caller(inspect.currentframe()), offset)

    codes = list[types.CodeType]()
    monitoring.use_tool_id(tool, "stopgrad_jax")
    try:
        # What another watch has turned off is not asked again, if it is not said.
        monitoring.restart_events()
        monitoring.register_callback(tool, events.PY_START, starts)
        monitoring.register_callback(tool, events.INSTRUCTION, goes_on)
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
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        # A generator is called each time that it goes on: `RESUME 1`, not `RESUME 0`.
        if not frame.f_code.co_code[frame.f_lasti + 1]:
            watch.begins(frame)
        return goes_on

    def goes_on(frame: types.FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "opcode":
            watch.goes_on(frame, frame.f_lasti)
        return goes_on

    before = sys.gettrace()
    sys.settrace(starts)
    try:
        yield
    finally:
        sys.settrace(before)
