"""One execution of a statement: the equations that were made while it was running.

Where it begins again is told by the Python stacks (`repeats.py`), and for a `sum`,
which looks the same in one execution and in two, by what its additions read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .bindings import Assigned, Binding, Position, is_within
from .elsewhere import leaves_more
from .labels import Spot, is_comprehension
from .repeats import Again, Stack, extent_of, is_again


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One equation of a run."""

    index: int
    eqn: Any
    spots: Sequence[Spot]


@dataclasses.dataclass(eq=False)
class Execution:
    """One execution of a statement; `depth` is that of its function in the spots."""

    target: int
    binding: Binding
    spot: Spot
    depth: int
    items: list[Item] = dataclasses.field(default_factory=list)
    before: Execution | None = None  # the execution that it follows at once
    unclear: bool = False

    @property
    def name(self) -> str:
        """The variable."""
        return self.binding.name

    @property
    def assigned(self) -> Assigned | None:
        """What it is given; None where the value is taken apart by a star."""
        return self.binding.assigned

    def is_cut_wrongly(self) -> bool:
        """Tell whether a function that JAX inlines may have been cut in two."""
        if self.before is None or not is_repeat(self.items[0], self.before.items[-1]):
            return False
        if not _jax.are_inlined(self.items[0].eqn, self.before.items[-1].eqn):
            return False
        a, b = ([i.eqn.primitive for i in run.items] for run in (self, self.before))
        return a != b


def begins_again(
    items: Sequence[Item],
    item: Item,
    depth: int,
    value: Position,
    rest: Iterable[Any] = (),
) -> Again:
    """Tell whether an equation begins a new execution; see `is_again`.

    `value` is the place of what the statement assigns; `rest` are the equations from
    this one on.
    """
    first, last, new = (_jax.stack_of(i.eqn) for i in (items[0], items[-1], item))
    # All equations of a function that JAX inlines have the stack of its call, so that a
    # new call shows by its first operation only.
    if _jax.are_inlined(item.eqn, items[-1].eqn):
        if item.eqn.primitive is not items[0].eqn.primitive:
            return Again.NO
    level = function_level(new, item, depth, value)
    if level is None:
        return Again.NO

    def anew(k: int) -> Again:
        return sums_anew([i.eqn for i in items], rest, k)

    again = is_again(first, last, new, level, value, anew)
    if again is Again.UNKNOWN and leaves_more(new, level, value, rest):
        return Again.NO
    return again


def sums_anew(made: Sequence[Any], rest: Iterable[Any], k: int) -> Again:
    """Tell whether a `sum` was called anew, or adds to what it added so far.

    The first that it adds is added to 0: it reads none of the sums that were made.

    Args:
      made: the equations so far, the last of them an addition.
      rest: those that follow.
      k: the position in the stacks of the frame that calls `sum`.

    Returns:
      UNKNOWN if nothing more is added.
    """
    last = _jax.stack_of(made[-1])

    def is_in_sum(eqn: Any) -> bool:
        return _jax.stack_of(eqn)[: k + 1] == last[: k + 1]

    def is_addition(eqn: Any) -> bool:
        inside = _jax.stack_of(eqn)[k + 1 :]
        return is_in_sum(eqn) and bool(inside) and inside[0][0] is last[k + 1][0]

    before = itertools.takewhile(is_addition, reversed(made))
    so_far = {v for eqn in before for v in eqn.outvars}
    inside = itertools.takewhile(is_in_sum, rest)
    after = itertools.dropwhile(lambda eqn: not is_addition(eqn), inside)
    additions = list(itertools.takewhile(is_addition, after))
    if not additions:
        return Again.UNKNOWN
    read = (
        v for eqn in additions for v in eqn.invars if not isinstance(v, _jax.Literal)
    )
    return Again.NO if any(v in so_far for v in read) else Again.YES


def level_of(stack: Stack, item: Item, depth: int) -> int | None:
    """Where in its stack an equation's spot at this depth is."""
    level = -1
    for spot in item.spots[: depth + 1]:
        later = range(level + 1, len(stack))
        level = next((k for k in later if stack[k][0] is spot.frame.code), None)
        if level is None:
            return None
    return level


def function_level(
    stack: Stack, item: Item, depth: int, value: Position | None = None
) -> int | None:
    """Where in its stack the function is that an equation's spot is written in.

    That is no comprehension, but for what is assigned (at `value`) in it.
    """
    level, spot = level_of(stack, item, depth), item.spots[depth]
    if level is None or not is_comprehension(spot.frame.code):
        return level
    if value and is_inside(value, spot):
        return level
    outer = (k for k in reversed(range(level)) if _is_home(stack[k][0], spot))
    return next(outer, level)


def is_inside(place: Position, spot: Spot) -> bool:
    """Tell whether a place is in the comprehension that a spot is in, but not all."""
    extent = extent_of(spot.frame.code) if spot.frame.code else place
    return place != extent and is_within(place, extent)


def _is_home(code: Any, spot: Spot) -> bool:
    return code.co_filename == spot.frame.file and code.co_qualname == spot.function


def is_repeat(a: Item, b: Item) -> bool:
    """Tell whether two equations were made by the same calls."""
    return _jax.stack_of(a.eqn) == _jax.stack_of(b.eqn)


def is_same_call(item: Item, other: Item, depth: int) -> bool:
    """Tell whether two equations were made in calls of one function from one place."""
    mine, its = item.spots, other.spots
    return (
        len(mine) > depth
        and mine[:depth] == its[:depth]
        and mine[depth].frame.code is its[depth].frame.code
    )
