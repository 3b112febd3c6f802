"""Whether the loops around a statement make equations besides its own.

Where a loop in what a statement calls and one around it look alike, the equations of
the loop's other statements tell the executions apart: they lie between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import stopgrad_jax._jax as _jax

from .bindings import Position
from .repeats import Stack, in_common, may_reenter, own_loops
from .ways import is_operator, is_passed, loops

_AHEAD = 256  # equations that are looked at


def leaves_more(stack: Stack, level: int, value: Position, rest: Iterable[Any]) -> bool:
    """Tell whether an equation of elsewhere lies between two executions.

    Args:
      stack: that of an equation of the statement.
      level: the position of the statement's own function in it.
      value: the place of the expression that the statement assigns.
      rest: equations that follow. One of them counts if an operator made it, or a
        function of JAX: it is made in each round.
    """
    every = loops(*stack[level])
    around = len(every) > len(own_loops(every, value))
    for eqn in itertools.islice(rest, _AHEAD):
        other = _jax.stack_of(eqn)
        k = in_common(stack, other)
        if k > level or k >= min(len(stack), len(other)):
            continue  # of the statement itself
        (code, here), (same, there) = stack[k], other[k]
        direct = len(other) > k + 1 and _jax.is_own(other[k + 1][0].co_filename)
        if code is not same or not (direct or is_operator(code, there)):
            continue
        # What lies outside of a loop that the statement is in need not come between two
        # executions of it.
        repeated = any(_is_repeated(stack, j) for j in range(k + 1, level))
        if repeated or (k < level and (around or may_reenter(stack, k))):
            continue
        anew = any(_is_repeated(stack, j) for j in range(k))
        if is_passed(code, here, there, value if k == level else None, anew):
            return True
    return False


def _is_repeated(stack: Stack, k: int) -> bool:
    return bool(loops(*stack[k])) or may_reenter(stack, k)
