"""From an equation to the user's own words: statement, variable, expression, callers.

JAX notes the Python stack at each equation. Its own frames and ours are left out;
what is left is the *path* of an equation: the user's calls, outermost first.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._places import LIBRARIES, printed_file

from .text import Source, Statement, source_of

_COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")


@dataclasses.dataclass(frozen=True, eq=False)
class Spot:
    """One expression of the user's code that was running; one object for each."""

    frame: _jax.Frame
    function: str

    @property
    def source(self) -> Source:
        """The file's text."""
        return source_of(self.frame.file)

    @functools.cached_property
    def is_current(self) -> bool:
        """Whether the text is still that of the running program."""
        code, place = self.frame.code, self.position
        return code is not None and self.source.is_current(
            code.co_name, code.co_firstlineno, place
        )

    @property
    def position(self) -> tuple[int, int, int, int]:
        """Line, column, end line and end column, in bytes."""
        frame = self.frame
        return frame.line, frame.col, frame.end_line, frame.end_col

    @functools.cached_property
    def statement(self) -> Statement | None:
        """The statement it is in; None without source or if that has changed."""
        if not self.is_current:
            return None
        is_lambda = self.function.endswith("<lambda>")
        return self.source.statement(self.position, is_lambda)

    @functools.cached_property
    def expression(self) -> str:
        """Its text, on one line; "source changed" if that was edited since."""
        if self.is_current:
            return self.source.expression(self.position)
        known = self.frame.code is not None and self.source.rows(1, 1)
        return "(source changed)" if known else ""

    @functools.cached_property
    def callee(self) -> str:
        """Name of the function that it calls, or ""."""
        return self.source.callee(self.position) if self.is_current else ""

    @functools.cached_property
    def called(self) -> str:
        """The text of the function that it calls, or ""."""
        return self.source.called(self.position) if self.is_current else ""

    @functools.cached_property
    def is_floor_division(self) -> bool:
        """Whether it is `a // b`."""
        return self.is_current and self.source.is_floor_division(self.position)

    @functools.cached_property
    def is_comparison(self) -> bool:
        """Whether it is `a < b` or the like."""
        return self.is_current and self.source.is_comparison(self.position)

    @functools.cached_property
    def file(self) -> str:
        """The file as it is printed: short, clickable, and the cell in a notebook."""
        return printed_file(self.frame.file)

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.frame.line}"

    def holds(self, other: Spot) -> bool:
        """Whether the other expression is this one or a part of it."""
        if self.frame.code is not other.frame.code:
            return False
        mine, its = self.position, other.position
        return mine[:2] <= its[:2] and its[2:] <= mine[2:]


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """The user's calls that made an equation, outermost first; equal ones are one.

    `inside`: the expression of another library that made it, if the innermost call is
    not the user's. `sampler`: it is of `jax.random`.
    """

    spots: tuple[Spot, ...]
    inside: Spot | None = None
    sampler: bool = False

    @property
    def library(self) -> bool:
        """Whether the innermost call is another library's."""
        return self.inside is not None

    @property
    def innermost(self) -> Spot | None:
        """The expression that made it, whoever wrote it; None without source."""
        return self.inside or (self.spots[-1] if self.spots else None)


class Labels:
    """Reads paths off equations; `fun`'s own package counts as the user's code."""

    def __init__(self, fun: Callable[..., Any] | None = None) -> None:
        self._home = _home(fun)
        self._spots: dict[Any, Spot] = {}
        self._paths: dict[Any, Path] = {}
        self._users: dict[str, bool] = {}
        self.nowhere = Path(())

    def path(self, eqn: Any, outer: Path) -> Path:
        """Return the path of an equation in a part of the program reached by `outer`.

        Bodies of jitted helpers of JAX have no frames: they are where they are called.
        """
        frames, sampler = _jax.frames_of(eqn)
        key = (outer, frames, sampler)
        if key not in self._paths:
            self._paths[key] = self._path(outer, frames, sampler)
        return self._paths[key]

    def _path(self, outer: Path, frames: Sequence[_jax.Frame], sampler: bool) -> Path:
        if not frames:
            key = (outer.spots, outer.inside, outer.sampler or sampler)
        else:
            spots, inside = list(outer.spots), None
            for frame in frames:
                if self.shows(frame):
                    self._push(spots, frame)
                    inside = None
                else:
                    inside = self._spot(frame, frame.function)
            key = (tuple(spots), inside, sampler)
        # Paths are compared by identity, and two stacks may lead to the same one.
        return self._paths.setdefault(key, Path(*key))

    def _push(self, spots: list[Spot], frame: _jax.Frame) -> None:
        name = frame.code.co_name if frame.code else ""
        function = frame.function
        if name in _COMPREHENSIONS:  # a part of the statement around it
            function = function_of(frame)
            # The one around it is the whole comprehension; this is the part that ran.
            if spots and spots[-1].frame.file == frame.file:
                spots.pop()
        spots.append(self._spot(frame, function))

    def _spot(self, frame: _jax.Frame, function: str) -> Spot:
        key = (frame, function)
        if key not in self._spots:
            self._spots[key] = Spot(frame, function)
        return self._spots[key]

    def shows(self, frame: _jax.Frame) -> bool:
        """Tell whether a call is in the paths: those of the user's code are."""
        return self.is_users(frame.file)

    def is_users(self, file: str) -> bool:
        """Tell the user's files from those of installed libraries."""
        if file not in self._users:
            real = os.path.realpath(file)
            library = real.startswith(LIBRARIES) or file.startswith("<frozen")
            at_home = self._home and real.startswith(self._home)
            self._users[file] = bool(at_home) or not library
        return self._users[file]


def is_comprehension(code: types.CodeType | None) -> bool:
    """Tell a comprehension or generator expression from a function."""
    return code is not None and code.co_name in _COMPREHENSIONS


def function_of(frame: _jax.Frame) -> str:
    """Return the name of the function that a comprehension is written in."""
    function = frame.function
    while function.rpartition(".")[2] in _COMPREHENSIONS:
        function = function.rpartition(".")[0].removesuffix(".<locals>")
    return function or frame.function


def code_of(fun: Any) -> types.CodeType | None:
    """Return the code of the function that its author wrote, if it can be found."""
    for _ in range(32):
        inner = getattr(fun, "__wrapped__", None) or getattr(fun, "func", None)
        inner = inner or getattr(fun, "__func__", None)
        if inner is None:
            break
        fun = inner
    code = getattr(fun, "__code__", None)
    if code is None and not isinstance(fun, type):
        code = getattr(type(fun).__call__, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _home(fun: Any) -> str:
    """Folder of the outermost package that a function is defined in, or ""."""
    code = code_of(fun)
    if code is None:
        return ""
    module = None
    for candidate in list(sys.modules.values()):
        if getattr(candidate, "__file__", None) == code.co_filename:
            module = candidate
            break
    package = (getattr(module, "__name__", None) or "").split(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    if not file or not os.path.basename(file).startswith("__init__"):
        return ""
    return os.path.join(os.path.dirname(os.path.realpath(file)), "")
