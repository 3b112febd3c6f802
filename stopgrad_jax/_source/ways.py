"""Where the instructions of a function lead: its loops, and what can follow what."""

from __future__ import annotations

import dis
import functools
import types
from typing import Any

from .bindings import Position, is_within, place_of


def loops(code: types.CodeType, start: int, end: int | None = None) -> list[Any]:
    """Loops around these instructions: the places of their first and last ones."""
    low, high = sorted((start, start if end is None else end))
    return [places for a, b, places in _all_loops(code) if a <= low <= high <= b]


def is_operator(code: types.CodeType, offset: int) -> bool:
    """Tell whether an instruction is `a * b`, `-a`, `a < b` or `a[b]`."""
    return _names(code).get(offset, "").startswith(("BINARY", "UNARY", "COMPARE"))


def leads_on(
    code: types.CodeType, start: int, end: int, within: Position | None = None
) -> bool:
    """Tell whether an instruction can run after another in one round of the loops.

    `within` is the place of a statement that is not left on the way.
    """
    _, places = _instructions(code)
    if start not in places or end not in places:
        return start < end
    if within is not None:
        for place in (places[start], places[end]):  # as of the targets before the `=`
            within = (*min(within[:2], place[:2]), *max(within[2:], place[2:]))
    return _leads_on(code, start, end, within)


def can_begin_past(code: types.CodeType, start: int, skipped: int) -> bool:
    """Tell whether an instruction can be reached in a call without another one."""
    follows, places = _instructions(code)
    if start not in places or skipped not in places or start == skipped:
        return True
    return start in _reached(code, min(follows), skipped)


def is_passed(
    code: types.CodeType, start: int, other: int, value: Position | None, anew: bool
) -> bool:
    """Tell whether another instruction runs before one runs again.

    Args:
      code: the function's code.
      start: the offset of the one.
      other: the offset of the other.
      value: the place of an expression that the other one is not in, and whose own
        loops do not count.
      anew: whether the function may be called again, too.
    """
    follows, places = _instructions(code)
    if start not in places or other not in places or start == other:
        return False
    if value is not None and is_within(places[other], value):
        return False
    after = _reached(code, start, other, value)
    if start in after:
        return False
    ends = any(not follows[offset] for offset in after)
    return not (anew and ends and can_begin_past(code, start, other))


def _reached(
    code: types.CodeType, start: int, skipped: int, value: Position | None = None
) -> set[int]:
    """Return what can run after an instruction, in any round of the loops."""
    follows, places = _instructions(code)
    seen, waiting = set[int](), [start]
    while waiting:
        one = waiting.pop()
        for other, back in follows.get(one, ()):
            own = value is not None and is_within(places[one], value)
            own = own and back and is_within(places[other], value or _NOWHERE)
            if other not in seen and other != skipped and not own:
                seen.add(other)
                waiting.append(other)
    return seen


@functools.cache
def _leads_on(
    code: types.CodeType, start: int, end: int, within: Position | None
) -> bool:
    follows, places = _instructions(code)
    # A `continue` goes back before the loop's last instruction does.
    ends = {to: offset for offset in follows for to, back in follows[offset] if back}
    seen, waiting = set[int](), [start]
    while waiting:
        for other, back in follows.get(waiting.pop(), ()):
            if back and other <= end <= ends[other]:  # of a loop that both are in
                continue
            place = places.get(other, _NOWHERE)
            inside = within is None or place == _NOWHERE or is_within(place, within)
            if inside and other not in seen:
                seen.add(other)
                waiting.append(other)
    return end in seen


@functools.cache
def _instructions(
    code: types.CodeType,
) -> tuple[dict[int, list[tuple[int, bool]]], dict[int, Position]]:
    """Return what follows each instruction, (offset, by a loop), and their places."""
    every = list(dis.get_instructions(code))
    follows: dict[int, list[tuple[int, bool]]] = {i.offset: [] for i in every}
    for i, after in zip(every, [*every[1:], None], strict=True):
        if after is not None and i.opname not in _NEVER_ON:
            follows[i.offset].append((after.offset, False))
        if i.opcode in dis.hasjrel:
            # The way back from a handler of exceptions is no loop.
            back = i.argval <= i.offset and "NO_INTERRUPT" not in i.opname
            follows[i.offset].append((i.argval, back))
    # From any instruction of a `try` its handler may be next.
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        for i in every:
            if entry.start <= i.offset < entry.end:
                follows[i.offset].append((entry.target, False))
    return follows, {i.offset: place_at(i) for i in every}


@functools.cache
def _names(code: types.CodeType) -> dict[int, str]:
    return {i.offset: i.opname for i in dis.get_instructions(code)}


@functools.cache
def _all_loops(
    code: types.CodeType,
) -> list[tuple[int, int, tuple[Position, Position]]]:
    follows, places = _instructions(code)
    return [
        (to, offset, (places[to], places[offset]))
        for offset, after in follows.items()
        for to, back in after
        if back
    ]


def place_at(instruction: dis.Instruction) -> Position:
    """Return the place in the text that an instruction is of; zeros without one."""
    place = place_of(instruction.positions) if instruction.positions else _NOWHERE
    return _NOWHERE if None in place else place


_NOWHERE: Position = (0, 0, 0, 0)
_NEVER_ON = frozenset(
    "JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT RETURN_VALUE RETURN_CONST "
    "RAISE_VARARGS RERAISE".split()
)
