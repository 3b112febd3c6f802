"""Tell a new execution of a statement from the rest of the one before it.

A loop that runs one statement leaves its equations side by side. Where the Python
instruction went back although no loop around it goes back, a new call has begun.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from .bindings import Position, is_within
from .ways import can_begin_past, leads_on, loops, place_at

Stack = Sequence[tuple[types.CodeType, int]]
GoesOn = Callable[[int], bool | None]


def is_again(
    first: Stack,
    last: Stack,
    new: Stack,
    level: int,
    value: Position,
    goes_on: GoesOn | None = None,
) -> bool | None:
    """Tell whether an equation begins a new execution of a statement.

    Args:
      first: the stack at the first equation of the execution so far.
      last: the stack at its last equation.
      new: the stack at the equation that follows.
      level: the position of the statement's own function in the stacks.
      value: the place of the expression that the statement assigns.
      goes_on: says of a call of `sum` at a position of the stacks whether what is
        added next is added to the sum so far; None if that is not known.

    Returns:
      None if both could be: loops around the statement and inside what it calls.

    Where the statement cannot lead from the last equation to the new one, whoever was
    called for the one and the other, a loop has gone round: or what calls it anew.
    """
    same = in_common(last, new)
    parted = same < min(len(last), len(new))
    apart = parted and last[same][0] is not new[same][0]
    if not new or same < level or (apart and same == level):
        return bool(new)
    if parted and not apart:
        place = value if same == level else None
        if leads_on(new[same][0], last[same][1], new[same][1], place):
            return False
    # Two functions that are entered from one instruction were called one after the
    # other: by a loop, or by one call of a function in C, as of `sum` and `reduce`.
    outer = any(loops(*new[k]) or calls_back(new, k) for k in range(level))
    inner = False
    for k in range(level, same if apart else min(same + 1, len(new))):
        code, offset = new[k]
        end = last[k][1] if k < len(last) else offset
        around = loops(code, offset, end)
        if k == level:
            own = own_loops(code, offset, value, end)
            outer = outer or len(own) < len(around)
            around = own
        inner = inner or bool(around)
    back = [k for k in range(level, same) if calls_back(new, k)]
    if outer and not inner and len(back) == 1 and goes_on:
        if new == first:
            return _adds_anew(new, back[0], goes_on) if apart else None
        if _adds_up(*new[back[0]]):  # else what was made is now added
            one, two = (_is_generator(s[back[0] + 1][0]) for s in (last, new))
            return two and not one and _adds_anew(new, back[0], goes_on)
    if outer and (inner or back):
        return None if _can_begin(first, new, level) else False
    return outer


def own_loops(
    code: types.CodeType, start: int, value: Position, end: int | None = None
) -> list[Any]:
    """Those of the loops around instructions that an expression itself has."""
    around = loops(code, start, end)
    return [loop for loop in around if all(is_within(p, value) for p in loop)]


def _can_begin(first: Stack, new: Stack, level: int) -> bool:
    """Tell whether an execution can begin with an equation, if one began with `first`.

    It cannot if Python always runs the instruction of that one before.
    """
    k = in_common(first, new)
    if k < level or k >= min(len(first), len(new)) or first[k][0] is not new[k][0]:
        return True
    return can_begin_past(new[k][0], new[k][1], first[k][1])


def begins_call(
    last: Stack, new: Stack, level: int, goes_on: GoesOn | None = None
) -> bool | None:
    """Tell whether a function was called anew between two equations.

    Args:
      last: the stack at an equation that was made in a call of it.
      new: the stack at the equation that follows at once.
      level: the position of the function in both stacks.
      goes_on: as for `is_again`.

    Returns:
      None if it may have been, or a loop in the function went round.
    """
    pairs = zip(last, new, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
    outer = any(loops(*new[k]) or calls_back(new, k) for k in range(level))
    end_level = len(new) if same is None else same
    inner = any(loops(*new[k]) for k in range(level, end_level))
    back = [k for k in range(level, end_level) if calls_back(new, k)]
    if same is None:  # one instruction: of a function that JAX inlines, or it again
        return (None if inner or back else True) if outer else False
    (code, end), (other, offset) = last[same], new[same]
    apart = code is not other
    if same < level or (same == level and apart):
        return True
    if not apart and leads_on(code, end, offset):
        return False
    inner = inner or (not apart and bool(loops(code, offset, end)))
    if outer and apart and not inner and len(back) == 1 and goes_on:
        one, two = last[back[0] + 1][0], new[back[0] + 1][0]
        if _is_generator(one):  # what it made is now added
            return False
        if one is two or _is_generator(two):
            return _adds_anew(new, back[0], goes_on)
    return (None if outer else False) if inner or back else outer or not apart


def _adds_anew(new: Stack, k: int, goes_on: GoesOn) -> bool | None:
    """Tell whether the call of `sum` at this position is another one; None: unknown."""
    on = goes_on(k) if _adds_up(*new[k]) else None
    return None if on is None else not on


def in_common(last: Stack, new: Stack) -> int:
    """Count the calls that two stacks begin with alike."""
    pairs = zip(last, new, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), len(new))


def extent_of(code: types.CodeType) -> Position:
    """Return the place of all that a comprehension does."""
    places = [p for p in code.co_positions() if None not in p and (p[3] or 0) > 0]
    starts, ends = [p[::2] for p in places], [p[1::2] for p in places]
    return (*min(starts), *max(ends))  # type: ignore[return-value]


def calls_back(stack: Stack, k: int) -> bool:
    """Tell whether one call of a function in C may enter the next frame repeatedly.

    A generator is, unless it is a loop of Python's that goes through it. A function is
    where the text calls one of these that calls functions back or goes through a `map`.
    """
    if k + 1 >= len(stack):
        return False
    operation, name, _ = _called(*stack[k])
    code = stack[k + 1][0]
    if _is_generator(code):
        return operation not in ("FOR_ITER", "SEND")
    through = operation in ("LIST_EXTEND", "SET_UPDATE", "UNPACK_SEQUENCE", "UNPACK_EX")
    if operation == "CALL_FUNCTION_EX":  # `f(*map(...))`, and not `f(*args)`
        return name in _LAZY
    return through or (name in _CALL_BACK and name != code.co_name)


def _is_generator(code: types.CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_GENERATOR)


def _adds_up(code: types.CodeType, offset: int) -> bool:
    """Tell a call of the builtin `sum` that begins with 0."""
    _, name, count = _called(code, offset)
    return name == "sum" and count == 1


# Behind a dot, too: functools.reduce and parts.extend, not x.sum.
_METHODS = frozenset(
    "accumulate extend fsum join prod reduce sort starmap update".split()
)
_CALL_BACK = _METHODS | frozenset(
    "all any deque dict filter frozenset list map max min set sorted sum tuple "
    "unflatten".split()
)
_LAZY = frozenset("accumulate filter map starmap zip".split())


@functools.cache
def _called(code: types.CodeType, offset: int) -> tuple[str, str, int]:
    """Return what an instruction does, what it calls by name, with how many arguments.

    No name for most methods: `x.sum()` is none of Python's. Of `f(*map(...))` it is
    what goes through the arguments.
    """
    before: list[dis.Instruction] = []
    for i in dis.get_instructions(code):
        if i.offset == offset:
            break
        before.append(i)
    else:
        return "", "", 0
    if not i.opname.startswith("CALL"):
        return i.opname, "", 0
    if i.opname == "CALL_FUNCTION_EX":
        star = next((b for b in before[::-1] if b.opname != "PUSH_NULL"), i)
        inner = star is not i and star.opname == "CALL"
        return i.opname, _called(code, star.offset)[1] if inner else "", 0
    start = place_at(i)[:2]
    loads = [
        b for b in before if b.opname.startswith("LOAD_") and "CONST" not in b.opname
    ]
    names = [str(b.argval) for b in loads if place_at(b)[:2] == start]
    is_known = len(names) == 1 or (bool(names) and names[-1] in _METHODS)
    name = names[-1] if is_known else ""
    return i.opname, name, (i.arg or 0) if i.opname == "CALL" else 0
