"""A nan that is a constant of the program, chosen because of another nan.

`jnp.select([z < 0, z >= 0], [a, b], jnp.nan)` returns the constant where z is nan: each
comparison with it is false. What was compared is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .entries import FILLS, has_nan, is_inexact, is_nan, ordinary
from .levels import Executed, Level
from .suspects import Entry, first_entry


def choosers(level: Level, before: Mapping[Entry, Sequence[Entry]]) -> list[Entry]:
    """Return the nans without which one of these entries would be another number.

    Of values that integers and booleans which its operation reads are computed from.
    `before` holds what made each entry nan: what was chosen.
    """
    for entry, made_by in before.items():
        op = level.ops[level.maker[entry.value]]
        nans, between = _compared(level, op)
        if not nans or not is_nan(level.values[entry.value], entry.index):
            continue
        position, same = op.writes.index(entry.value), {e.value for e in made_by}
        runs = (_run(level, op, nans, between, same, fill) for fill in FILLS)
        if any(not is_nan(out[position], entry.index) for out in runs):
            return [e for k in nans if (e := _entry(level, k, entry)) is not None]
    return []


def _compared(level: Level, op: Executed) -> tuple[list[int], list[Executed]]:
    """The last nans behind what an operation reads exactly, and what is between."""
    nans, between = dict[int, None](), dict[int, None]()
    waiting = [k for k in op.reads if not is_inexact(level.values[k])]
    for value in waiting:
        number = level.maker.get(value)
        if number is None or number in between:
            continue
        between[number] = None
        for k in level.ops[number].reads:
            x = level.values[k]
            if has_nan(x):
                nans[k] = None
            elif k not in waiting:
                waiting.append(k)
    return list(nans), [level.ops[number] for number in sorted(between)]


def _run(
    level: Level,
    op: Executed,
    nans: list[int],
    between: list[Executed],
    same: set[int],
    fill: str,
) -> list[Any]:
    """Run an operation as if what was compared had been ordinary numbers.

    So are its other operands, but for the `same`: one of them may be chosen then.
    """
    other = {k: ordinary(level.values[k], fill=fill) for k in nans}
    for earlier in between:
        operands = [other.get(k, level.values[k]) for k in earlier.reads]
        other.update(zip(earlier.writes, earlier.run(*operands), strict=True))
    for k in op.reads:
        if k not in same and k not in other and is_inexact(level.values[k]):
            other[k] = ordinary(level.values[k], fill=fill)
    return op.run(*[other.get(k, level.values[k]) for k in op.reads])


def _entry(level: Level, value: int, like: Entry) -> Entry | None:
    """Return the nan at the same place of a value, or its first one."""
    x = level.values[value]
    alike = np.shape(x) == np.shape(level.values[like.value])
    if alike and is_nan(x, like.index):
        return Entry(value, like.index)
    return first_entry(level, value)
