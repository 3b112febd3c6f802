"""Tell a new execution of a statement from the rest of the one before it.

A loop that runs one statement leaves its equations side by side. Where the Python
instruction went back although no loop around it goes back, a new call has begun.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from .bindings import Position, is_within
from .ways import can_begin_past, leads_on, loops, place_at

Stack = Sequence[tuple[types.CodeType, int]]


class Again(enum.Enum):
    """Whether a statement, or a function, had begun anew when an equation was made.

    Say `x @ w` follows another `x @ w` of the same line.

    YES, in `for w in ws: x = x @ w`: nothing but the loop goes back to it.
    NO, in `h = mlp(x)`, if the loop over ws is in mlp: the statement still runs.
    UNKNOWN, in `for x in xs: h = mlp(x)`: it is the second layer, or another call.
    """

    YES = enum.auto()
    NO = enum.auto()
    UNKNOWN = enum.auto()


# Of the frame at this position of the stacks, which calls `sum`: whether the next
# addition is of another call of it.
SumsAnew = Callable[[int], Again]


def is_again(
    first: Stack,
    last: Stack,
    new: Stack,
    level: int,
    value: Position,
    sums_anew: SumsAnew | None = None,
) -> Again:
    """Tell whether an equation begins a new execution of a statement.

    Args:
      first: the stack at the first equation of the execution so far.
      last: the stack at its last equation.
      new: the stack at the equation that follows.
      level: the position of the statement's own function in the stacks.
      value: the place of the expression that the statement assigns.
      sums_anew: see above; without it, no call of `sum` is looked into.

    Where the statement cannot lead from the last equation to the new one, whoever was
    called for the one and the other, a loop has gone round: or what calls it anew.
    """
    if not new:
        return Again.NO
    same = in_common(last, new)
    parted = same < min(len(last), len(new))
    apart = parted and last[same][0] is not new[same][0]
    if same < level or (apart and same == level):
        return Again.YES
    if parted and not apart:
        place = value if same == level else None
        if leads_on(new[same][0], last[same][1], new[same][1], place):
            return Again.NO
    # Two functions that are entered from one instruction were called one after the
    # other: by a loop, or by one call of a function in C, as of `sum` and `reduce`.
    end = same if apart else min(same + 1, len(new))
    ends = [last[k][1] if k < len(last) else new[k][1] for k in range(level, end)]
    inside = [loops(*at, b) for at, b in zip(new[level:end], ends, strict=True)]
    own = own_loops(inside[0], value)
    outer = len(own) < len(inside[0]) or _is_repeated(new, level)
    inner = any([own, *inside[1:]])
    back = [k for k in range(level, same) if may_reenter(new, k)]
    if not outer:
        return Again.NO
    if not inner and not back:
        return Again.YES
    if not inner and len(back) == 1 and sums_anew:
        (k,) = back
        if new == first:
            return _adds_anew(new, k, sums_anew) if apart else Again.UNKNOWN
        if _adds_up(*new[k]):
            # `sum(f(x) for x in xs)` takes turns: the generator makes a term, and `+`
            # adds it. Only where a term follows a sum may another `sum` have begun.
            made, makes = (_is_generator(s[k + 1][0]) for s in (last, new))
            turns = makes and not made
            return _adds_anew(new, k, sums_anew) if turns else Again.NO
    return Again.UNKNOWN if _can_begin(first, new, level) else Again.NO


def own_loops(around: Sequence[Any], value: Position) -> list[Any]:
    """Return those loops around an instruction that an expression itself has."""
    return [loop for loop in around if all(is_within(p, value) for p in loop)]


def _is_repeated(stack: Stack, level: int) -> bool:
    """Tell whether anything above a frame may run it again."""
    return any(loops(*stack[k]) or may_reenter(stack, k) for k in range(level))


def _can_begin(first: Stack, new: Stack, level: int) -> bool:
    """Tell whether an execution can begin with an equation, if one began with `first`.

    It cannot if Python always runs the instruction of that one before.
    """
    k = in_common(first, new)
    if k < level or k >= min(len(first), len(new)) or first[k][0] is not new[k][0]:
        return True
    return can_begin_past(new[k][0], new[k][1], first[k][1])


def begins_call(
    last: Stack, new: Stack, level: int, sums_anew: SumsAnew | None = None
) -> Again:
    """Tell whether a function was called anew between two equations.

    UNKNOWN also where a loop in the function may have gone round.

    Args:
      last: the stack at an equation that was made in a call of it.
      new: the stack at the equation that follows at once.
      level: the position of the function in both stacks.
      sums_anew: as for `is_again`.
    """
    pairs = zip(last, new, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
    outer = _is_repeated(new, level)
    end_level = len(new) if same is None else same
    inner = any(loops(*new[k]) for k in range(level, end_level))
    back = [k for k in range(level, end_level) if may_reenter(new, k)]
    if same is None:  # one instruction: of a function that JAX inlines, or it again
        if not outer:
            return Again.NO
        return Again.UNKNOWN if inner or back else Again.YES
    (code, end), (other, offset) = last[same], new[same]
    apart = code is not other
    if same < level or (same == level and apart):
        return Again.YES
    if not apart and leads_on(code, end, offset):
        return Again.NO
    inner = inner or (not apart and bool(loops(code, offset, end)))
    if outer and apart and not inner and len(back) == 1 and sums_anew:
        one, two = last[back[0] + 1][0], new[back[0] + 1][0]
        if _is_generator(one):  # what it made is now added
            return Again.NO
        if one is two or _is_generator(two):
            return _adds_anew(new, back[0], sums_anew)
    if inner or back:
        return Again.UNKNOWN if outer else Again.NO
    return Again.YES if outer or not apart else Again.NO


def _adds_anew(new: Stack, k: int, sums_anew: SumsAnew) -> Again:
    return sums_anew(k) if _adds_up(*new[k]) else Again.UNKNOWN


def in_common(last: Stack, new: Stack) -> int:
    """Count the calls that two stacks begin with alike."""
    pairs = zip(last, new, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), len(new))


def extent_of(code: types.CodeType) -> Position:
    """Return the place of all that a comprehension does."""
    places = [p for p in code.co_positions() if None not in p and (p[3] or 0) > 0]
    starts, ends = [p[::2] for p in places], [p[1::2] for p in places]
    return (*min(starts), *max(ends))  # type: ignore[return-value]


def may_reenter(stack: Stack, k: int) -> bool:
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
    # What is called is loaded at the place where the call begins: `functools` and
    # `reduce` of `functools.reduce(f, xs)`, and neither f nor xs.
    start = place_at(i)[:2]
    loads = [
        b for b in before if b.opname.startswith("LOAD_") and "CONST" not in b.opname
    ]
    names = [str(b.argval) for b in loads if place_at(b)[:2] == start]
    is_known = len(names) == 1 or (bool(names) and names[-1] in _METHODS)
    name = names[-1] if is_known else ""
    return i.opname, name, (i.arg or 0) if i.opname == "CALL" else 0
