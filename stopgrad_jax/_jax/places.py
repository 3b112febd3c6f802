"""Where an equation comes from: lines, scopes, and the calls that made it."""

from __future__ import annotations

import dis
import functools
import itertools
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jaxlib
from jax.extend import source_info_util


def line_of(eqn: Any) -> str:
    """Return `file:line` of the user's code that made this equation, or ""."""
    return _file_and_line(eqn.source_info)


def _file_and_line(source_info: Any) -> str:
    summary = source_info_util.summarize(source_info)  # "file:line:col (name)"
    parts = summary.split(" ")[0].split(":")
    while len(parts) > 1 and parts[-2].isdigit():
        parts.pop()  # the column
    return ":".join(parts) if len(parts) > 1 and parts[-1].isdigit() else ""


def transforms_of(eqn: Any) -> tuple[str, ...]:
    """Names of the transformations that made an equation, the outermost first.

    `("transpose", "jvp")` in a backward pass. A name stack holds the user's scopes
    beside them, which may be called anything: told by JAX's kind, not by their text.
    """
    stack = eqn.source_info.name_stack.stack
    return tuple(part.name for part in stack if type(part).__name__ == "Transform")


def scope_of(eqn: Any) -> str:
    """Return the path of the user's scopes around an equation, without transforms."""
    stack = eqn.source_info.name_stack.stack
    return "/".join(part.name for part in stack if type(part).__name__ == "Scope")


def callers_of(eqn: Any) -> tuple[str, ...]:
    """Names of the functions on the stack when the equation was made."""
    traceback = eqn.source_info.traceback
    return tuple(f.function_name for f in traceback.frames) if traceback else ()


class Frame(NamedTuple):
    """A call on the Python stack: its code and the place that was running.

    `code` is None, and the columns are 0, where JAX tells nothing but a line. Two codes
    are equal if their source is, as of a cell that was run twice: they are told apart
    by `identity`.
    """

    code: types.CodeType | None
    file: str
    function: str
    line: int
    col: int = 0
    end_line: int = 0
    end_col: int = 0
    identity: int = 0


def frames_of(eqn: Any) -> tuple[tuple[Frame, ...], bool]:
    """Return the calls that made an equation, outermost first, without JAX's own.

    The second value tells whether the innermost of them called `jax.random`. In a
    nested jaxpr the frames begin inside it. From `Traceback.raw_frames`, which is
    not documented; without it, from the one frame that is.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return (), False
    if not hasattr(traceback, "raw_frames"):
        return _summarized(eqn), False
    frames, sampler = [], False
    # Every equation has the frames of all that ran around it, and mostly the same as
    # the last one: each file and each place is looked at once.
    locate = type(traceback).code_addr2location
    for code, address in zip(*traceback.raw_frames(), strict=True):
        file = code.co_filename
        if file not in _SKIPPED:
            _SKIPPED[file] = file.startswith(OWN)
        if not _SKIPPED[file]:
            key = (id(code), file, address)  # the frame keeps the code, so its id stays
            frame = _FRAMES.get(key)
            if frame is None:
                place = locate(code, address)
                frame = Frame(code, file, code.co_qualname, *place, identity=id(code))
                _FRAMES[key] = frame
            frames.append(frame)
        # The innermost come first: no frame of the user's lies between it and the
        # equation.
        elif not frames and code.co_filename.startswith(_RANDOM):
            sampler = True
    return tuple(reversed(frames)), sampler


_FRAMES: dict[Any, Frame] = {}
_SKIPPED: dict[str, bool] = {}
OWN = tuple(
    os.path.join(os.path.dirname(os.path.abspath(file)), "")
    for file in (jax.__file__, jaxlib.__file__, os.path.dirname(__file__))
)
_RANDOM = os.path.join(os.path.dirname(jax.__file__), "_src", "random")
_API = os.path.join(os.path.dirname(jax.__file__), "_src", "api.py")
_WRAPPER = os.path.join("_src", "traceback_util.py")  # around each function of the API


def _summarized(eqn: Any) -> tuple[Frame, ...]:
    file, _, line = line_of(eqn).rpartition(":")
    callers = callers_of(eqn)
    return (
        (Frame(None, file, callers[0] if callers else "", int(line)),) if file else ()
    )


def stack_of(eqn: Any) -> tuple[tuple[types.CodeType, int], ...]:
    """Return all that ran when an equation was made, outermost first, JAX too.

    A code object and the offset of its instruction each; empty without `raw_frames`.
    """
    traceback = eqn.source_info.traceback
    if not hasattr(traceback, "raw_frames"):
        return ()
    frames = zip(*traceback.raw_frames(), strict=True)
    # From 3.12 on a call has one offset.
    if sys.version_info < (3, 12):
        frames = ((code, _calls(code).get(offset, offset)) for code, offset in frames)
    return tuple(frames)[::-1]


def are_inlined(a: Any, b: Any) -> bool:
    """Tell whether two equations came into the program by one call.

    Those of a function that JAX inlines share one record of the stack.
    """
    return a.source_info.traceback is b.source_info.traceback


@functools.cache
def _calls(code: types.CodeType) -> dict[int, int]:
    """Return where a call is, for the other offsets that Python 3.11 has for it.

    The instruction before, once a function in C was called often enough; the last
    entry of its cache, while a function of Python runs.
    """
    where, call = dict[int, int](), -1
    for i in dis.get_instructions(code, show_caches=True):
        if i.opname != "CACHE":
            call = i.offset
        elif call >= 0:
            where[i.offset] = call
    pairs = itertools.pairwise(dis.get_instructions(code))
    where.update({a.offset: b.offset for a, b in pairs if a.opname == "PRECALL"})
    return {offset: where.get(at, at) for offset, at in where.items()}


def is_of_jax(eqn: Any) -> bool:
    """Tell a `stop_gradient` that JAX wrote from one of the user or of this package.

    Jitted helpers of JAX have no stack at all.
    """
    code = stopped_in(eqn)
    return code is None or code.co_filename.startswith(OWN[:2])


def stopped_in(eqn: Any) -> types.CodeType | None:
    """Return the function that called `stop_gradient`, if a stack tells."""
    outer = None
    for code, _ in stack_of(eqn):
        if code.co_name == "stop_gradient" and code.co_filename.startswith(OWN[:2]):
            return outer
        outer = code
    return None


def vmaps_of_jax(eqn: Any) -> int:
    """Count the calls of `jax.vmap` around an equation that JAX itself wrote.

    As `jnp.linalg.solve` maps over its columns: those are nobody's examples.
    """
    callers = [c for c, _ in stack_of(eqn) if not c.co_filename.endswith(_WRAPPER)]
    return sum(
        code.co_name == "vmap_f"
        and code.co_filename == _API
        and outer.co_filename.startswith(OWN[:2])
        for outer, code in itertools.pairwise(callers)
    )


def is_derivative(stack: Sequence[tuple[types.CodeType, int]]) -> bool:
    """Tell whether one of these calls is that of `jax.grad`, `jvp` or the like."""
    return any(
        code.co_name in ("vjp", "jvp", "_vjp", "_jvp", "linearize")
        and code.co_filename == _API
        for code, _ in stack
    )


def linearized_in(eqn: Any) -> frozenset[types.CodeType]:
    """Return the functions whose `jax.vjp` or the like an equation is a result's of.

    A linear function that it returned made the equation, wherever that was called; of
    `jax.linearize` the values are told by the same.
    """
    made, names = transforms_of(eqn), set[str]()
    if "transpose" in made:
        names = {"vjp", "linear_transpose"}
    elif "jvp" in made:
        names = {"linearize"}
    else:
        return frozenset()
    callers = [c for c, _ in stack_of(eqn) if not c.co_filename.endswith(_WRAPPER)]
    return frozenset(
        outer
        for outer, code in itertools.pairwise(callers)
        if code.co_filename == _API
        and code.co_name in names
        and not is_own(outer.co_filename)
    )


def is_own(file: str) -> bool:
    """Tell a file of JAX, or of this package."""
    return file.startswith(OWN)


def is_of_package(file: str) -> bool:
    """Tell a file of this package."""
    return file.startswith(OWN[2])


def line_here() -> str:
    """Return `file:line` of the user's code that is running, or ""."""
    return _file_and_line(source_info_util.current())
