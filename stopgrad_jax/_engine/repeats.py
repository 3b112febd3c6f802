"""Tell a new execution of a statement from the rest of the one before it.

A loop that runs one statement leaves its equations side by side. Where the Python
instruction went back although no loop around it goes back, a new call has begun.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Sequence
from typing import Any

from .bindings import Position, is_within

Stack = Sequence[tuple[types.CodeType, int]]


def is_again(
    first: Stack, last: Stack, new: Stack, level: int, value: Position
) -> bool | None:
    """Tell whether an equation begins a new execution of a statement.

    Args:
      first: the stack at the first equation of the execution so far.
      last: the stack at its last equation.
      new: the stack at the equation that follows.
      level: the position of the statement's own function in the stacks.
      value: the place of the expression that the statement assigns.

    Returns:
      None if both could be: loops around the statement and inside what it calls.
    """
    if not new or new != first:
        return False
    pairs = zip(last, new, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), len(new))
    if same < level or (same < len(new) and last[same][0] is not new[same][0]):
        return True
    inner, outer = False, any(_loops(*new[k]) for k in range(level))
    for k in range(level, min(same + 1, len(new))):
        code, offset = new[k]
        end = last[k][1] if k < len(last) else offset
        if offset > end:
            return False
        around = _loops(code, offset, end)
        if k == level:
            own = [loop for loop in around if all(is_within(p, value) for p in loop)]
            outer = outer or len(own) < len(around)
            around = own
        inner = inner or bool(around)
    return None if inner and outer else outer


def begins_call(last: Stack, new: Stack, level: int) -> bool | None:
    """Tell whether a function was called anew between two equations.

    Args:
      last: the stack at an equation that was made in a call of it.
      new: the stack at the equation that follows at once.
      level: the position of the function in both stacks.

    Returns:
      None if it may have been, or a loop in the function went round.
    """
    pairs = zip(last, new, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
    outer = any(_loops(*new[k]) for k in range(level))
    end_level = len(new) if same is None else same
    inner = any(_loops(*new[k]) for k in range(level, end_level))
    if same is None:  # one instruction: of a function that JAX inlines, or it again
        return (None if inner else True) if outer else False
    (code, end), (other, offset) = last[same], new[same]
    if same < level or (same == level and code is not other):
        return True
    if code is other and offset > end:
        return False
    inner = inner or (code is other and bool(_loops(code, offset, end)))
    return (None if outer else False) if inner else True


def _loops(code: types.CodeType, start: int, end: int | None = None) -> list[Any]:
    """Loops around these instructions: the places of their first and last ones."""
    end = start if end is None else end
    return [
        places for low, high, places in _all_loops(code) if low <= start <= end <= high
    ]


@functools.cache
def _all_loops(
    code: types.CodeType,
) -> list[tuple[int, int, tuple[Position, Position]]]:
    places = {i.offset: _place(i) for i in dis.get_instructions(code)}
    return [
        (i.argval, i.offset, (places[i.argval], places[i.offset]))
        for i in dis.get_instructions(code)
        # The way back from a handler of exceptions is no loop.
        if i.opcode in dis.hasjrel and i.argval <= i.offset
        if "NO_INTERRUPT" not in i.opname
    ]


def _place(instruction: dis.Instruction) -> Position:
    p = instruction.positions
    if p is None or None in (p.lineno, p.col_offset, p.end_lineno, p.end_col_offset):
        return (0, 0, 0, 0)
    return (p.lineno, p.col_offset, p.end_lineno, p.end_col_offset)  # type: ignore[return-value]
