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
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .as_written import anew


@dataclasses.dataclass(frozen=True)
class Seen:
    """A variable, global or attribute was given a value at a place of the text.

    `variable` is what it is in the program, None if that is not known; `is_array`: it
    is one of JAX's arrays that are traced. `name` is spelled as in the text. Of a
    parameter that a function was handed, `function` is its name.
    """

    file: str
    name: str
    place: tuple[int, int, int, int]
    variable: Any
    is_array: bool
    function: str = ""

    @property
    def line(self) -> int:
        """The line of what is assigned to."""
        return self.place[0]


@dataclasses.dataclass(frozen=True)
class _Store:
    """An instruction that stores: what, as spelled and as Python names it, and where.

    `base` is the variable whose attributes the rest of `path` are; "" of a variable.
    """

    name: str
    place: tuple[int, int, int, int]
    base: str
    path: tuple[str, ...]

    def value(self, frame: types.FrameType) -> Any:
        """Return what is there now, without running code of the user's."""
        first = self.base or self.path[0]
        names = frame.f_locals if first in frame.f_locals else frame.f_globals
        value = names.get(first)
        for attribute in self.path if self.base else ():
            value = _held(value, attribute)
        return value


class Watcher:
    """Notes what the variables of functions are given, but for those of JAX.

    No value and no frame is kept: `jax.checking_leaks` counts those that are.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.seen: list[Seen] = []
        self._names = names
        self._stores: dict[types.CodeType, dict[int, list[_Store]]] = {}
        self._stored: dict[int, list[_Store]] = {}  # by frame, just now

    def is_of_interest(self, code: types.CodeType) -> bool:
        """Tell a function, not of JAX, that stores variables of these names."""
        # The body of a module or a class is not optimized: it is no function.
        if not code.co_flags & inspect.CO_OPTIMIZED or _jax.is_own(code.co_filename):
            return False
        names = code.co_varnames + code.co_cellvars + code.co_freevars + code.co_names
        if self._names.isdisjoint(map(_spelled, names)):
            return False
        return bool(self._stores_of(code) or self._parameters_of(code))

    def begins(self, frame: types.FrameType) -> None:
        """A function begins; another one may have had its frame's place before."""
        self._stored.pop(id(frame), None)
        code = frame.f_code
        for name in self._parameters_of(code):
            value = frame.f_locals.get(name)
            if _jax.is_tracer(value):
                place = (code.co_firstlineno, 0, code.co_firstlineno, 0)
                variable, function = _jax.variable_under(value), code.co_qualname
                one = Seen(code.co_filename, name, place, variable, True, function)
                self.seen.append(one)

    def _parameters_of(self, code: types.CodeType) -> list[str]:
        count = code.co_argcount + code.co_kwonlyargcount
        return [name for name in code.co_varnames[:count] if name in self._names]

    def goes_on(self, frame: types.FrameType, offset: int) -> None:
        """An instruction is about to run: what the one before stored is there."""
        for store in self._stored.pop(id(frame), ()):
            value = store.value(frame)
            is_array = _jax.is_tracer(value)
            variable = _jax.variable_under(value) if is_array else None
            file = frame.f_code.co_filename
            self.seen.append(Seen(file, store.name, store.place, variable, is_array))
        if stored := self._stores_of(frame.f_code).get(offset):
            self._stored[id(frame)] = stored

    def _stores_of(self, code: types.CodeType) -> dict[int, list[_Store]]:
        """Return what instructions store under one of the names, by offset."""
        if code not in self._stores:
            found = self._stores[code] = {}
            instructions = list(dis.get_instructions(code))
            for k, i in enumerate(instructions):
                if i.opname in _STORES and i.positions and i.positions.lineno:
                    stores = list(self._stored_by(instructions, k))
                    if stores:
                        found[i.offset] = stores
        return self._stores[code]

    def _stored_by(
        self, instructions: Sequence[dis.Instruction], k: int
    ) -> Iterator[_Store]:
        """Yield what an instruction stores under one of the names: mostly one thing."""
        i = instructions[k]
        place = _place(i)
        named = i.argval if isinstance(i.argval, tuple) else (i.argval,)
        # `a, b = f()` is one instruction since Python 3.13. Of STORE_FAST_LOAD_FAST the
        # second name is read.
        count = 2 if i.opname == "STORE_FAST_STORE_FAST" else 1
        for name in named[:count]:
            if _spelled(name) not in self._names:
                continue
            if i.opname != "STORE_ATTR":
                yield _Store(_spelled(name), place, "", (name,))
            # `a.b.c = v` loads v, then `a.b`, right before it stores.
            elif base := _base(instructions[:k]):
                first, *attributes = base
                spelled = ".".join([*map(_spelled, base), _spelled(name)])
                yield _Store(spelled, place, first, (*attributes, name))


_STORES = (
    "STORE_FAST STORE_DEREF STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST STORE_GLOBAL "
    "STORE_ATTR"
).split()


def _place(i: dis.Instruction) -> tuple[int, int, int, int]:
    at = i.positions
    assert at is not None
    assert at.lineno is not None
    col, end = at.col_offset or 0, at.end_col_offset or 0
    return at.lineno, col, at.end_lineno or at.lineno, end


def _base(before: Sequence[dis.Instruction]) -> list[str]:
    """Return `["self", "cell"]` where `self.cell` was loaded last, if it was one."""
    names = list[str]()
    for i in reversed(before):
        if i.opname == "LOAD_ATTR" and isinstance(i.argval, str):
            names.insert(0, i.argval)
        elif i.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL")):
            last = i.argval[-1] if isinstance(i.argval, tuple) else i.argval
            return [last, *names]
        elif i.opname != "CACHE":
            break
    return []


def _spelled(name: str) -> str:
    """Return a name as the text has it, where Python put the class before it."""
    mangled = re.fullmatch(r"_[^_]\w*?(__\w+)", name)
    return mangled[1] if mangled and not name.endswith("__") else name


def _held(x: Any, attribute: str) -> Any:
    """Return an attribute that is stored in an object, and none that is computed."""
    own = getattr(x, "__dict__", {})
    if attribute in own:
        return own[attribute]
    slot = inspect.getattr_static(type(x), attribute, None)
    is_slot = isinstance(slot, types.MemberDescriptorType)
    return getattr(x, attribute, None) if is_slot else None


@contextlib.contextmanager
def watching(names: frozenset[str]) -> Iterator[Watcher]:
    """Watch the functions that have variables of these names, as far as Python lets us.

    JAX runs those anew that it has traced before, too.
    """
    watch = Watcher(names)
    listening = _monitored if sys.version_info >= (3, 12) else _traced
    with anew(), listening(watch):
        yield watch


@contextlib.contextmanager
def _monitored(watch: Watcher) -> Iterator[None]:
    monitoring = sys.monitoring
    events = monitoring.events
    free = (k for k in range(6) if monitoring.get_tool(k) is None)
    tool = next(free, None)
    if tool is None:  # a debugger, a profiler and others have them all
        yield
        return

    def starts(code: types.CodeType, _: int) -> Any:
        if not watch.is_of_interest(code):
            # Python asks no more about this code, and runs it as fast as before.
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
def _traced(watch: Watcher) -> Iterator[None]:
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
