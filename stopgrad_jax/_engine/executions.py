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
from .labels import Spot, is_comprehension
from .repeats import Stack, extent_of, is_again


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
        a, b = ([i.eqn.primitive for i in run.items] for run in (self, self.before))
        return a != b


def begins_again(
    items: Sequence[Item],
    item: Item,
    depth: int,
    value: Position,
    rest: Iterable[Any] = (),
) -> bool | None:
    """Tell whether an equation begins a new execution; see `is_again`.

    `value` is the place of what the statement assigns; `rest` are the equations from
    this one on.
    """
    first, last, new = (_jax.stack_of(i.eqn) for i in (items[0], items[-1], item))
    # The equations of a function that JAX inlines have one stack.
    if new == last and item.eqn.primitive is not items[0].eqn.primitive:
        return False
    level = level_of(new, item, depth, value)
    if level is None:
        return False

    def goes_on(k: int) -> bool | None:
        return _adds_to(items, rest, k)

    return is_again(first, last, new, level, value, goes_on)


def _adds_to(items: Sequence[Item], rest: Iterable[Any], k: int) -> bool | None:
    """Tell whether a `sum`, called at this position, adds to what it added so far.

    If it was called anew, the first that it adds is added to 0. None if it adds
    nothing more.
    """
    last = _jax.stack_of(items[-1].eqn)

    def is_in_sum(eqn: Any) -> bool:
        return _jax.stack_of(eqn)[: k + 1] == last[: k + 1]

    def is_addition(eqn: Any) -> bool:
        inside = _jax.stack_of(eqn)[k + 1 :]
        return is_in_sum(eqn) and bool(inside) and inside[0][0] is last[k + 1][0]

    before = itertools.takewhile(is_addition, (i.eqn for i in reversed(items)))
    so_far = {v for eqn in before for v in eqn.outvars}
    inside = itertools.takewhile(is_in_sum, rest)
    after = itertools.dropwhile(lambda eqn: not is_addition(eqn), inside)
    additions = list(itertools.takewhile(is_addition, after))
    if not additions:
        return None
    read = (v for eqn in additions for v in eqn.invars if not is_literal(v))
    return any(v in so_far for v in read)


def level_of(
    stack: Stack, item: Item, depth: int, value: Position | None = None
) -> int | None:
    """Where in its stack an equation's spot at this depth is.

    A comprehension is a part of the function that it is written in; but not for what
    is assigned (at `value`) in it.
    """
    level = -1
    for spot in item.spots[: depth + 1]:
        later = (k for k in range(level + 1, len(stack)))
        level = next((k for k in later if stack[k][0] is spot.frame.code), None)
        if level is None:
            return None
    code, spot = stack[level][0], item.spots[depth]
    if not is_comprehension(code) or (value and is_within(value, extent_of(code))):
        return level
    outer = (k for k in reversed(range(level)) if _is_home(stack[k][0], spot))
    return next(outer, level)


def _is_home(code: Any, spot: Spot) -> bool:
    return code.co_filename == spot.frame.file and code.co_qualname == spot.function


def is_repeat(a: Item, b: Item) -> bool:
    """Tell whether two equations were made by the same calls."""
    return _jax.stack_of(a.eqn) == _jax.stack_of(b.eqn)


def is_literal(atom: Any) -> bool:
    """Tell a constant of the program from a variable."""
    return isinstance(atom, _jax.Literal)
