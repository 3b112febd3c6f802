"""Which nonfinite operands of an operation are to blame for its result."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .entries import (
    FILLS,
    Index,
    count_nonfinite,
    critical,
    index_of,
    is_bad,
    is_nan,
    only,
    ordinary,
    places,
    wide,
)
from .levels import Executed, Level


class Entry(NamedTuple):
    """One entry of one value of a level."""

    value: int
    index: Index  # type: ignore[reportIncompatibleMethodOverride]


def first_entry(level: Level, value: int) -> Entry | None:
    """Return the first nan of a value, or else the first inf."""
    x = level.values[value]
    if not count_nonfinite(x):
        return None
    nan = np.flatnonzero(np.isnan(wide(x)))
    number = nan[0] if len(nan) else places(x)[0]
    return Entry(value, index_of(number, np.shape(x)))


class Suspects:
    """The nonfinite operands of an operation of which one result is nonfinite."""

    def __init__(self, level: Level, op: Executed, entry: Entry) -> None:
        self._level, self._op = level, op
        self._value, self._index = entry
        self._position = op.writes.index(entry.value)
        self._shape = np.shape(level.values[entry.value])
        self._bad = [
            k for k in dict.fromkeys(op.reads) if count_nonfinite(level.values[k])
        ]
        self._fill = ""

    def guilty(self) -> list[Entry]:
        """Return an entry of each operand that is to blame; none: it is born here."""
        if not self._bad:
            return []
        # Some fill may be outside of the operation's domain: that it fails proves
        # nothing.
        fills = (fill for fill in FILLS if not self._fails({}, fill))
        self._fill = next(fills, "")
        if not self._fill:
            return []
        return list(filter(None, map(self._alone, self._bad))) or self._together()

    def _fails(self, kept: dict[int, Any], fill: str = "") -> bool:
        """Whether the result is nonfinite still if only these entries are so."""
        operands = cleaned(self._level, self._op, kept, fill or self._fill)
        return is_bad(self._op.run(*operands)[self._position], self._index)

    def _alone(self, k: int) -> Entry | None:
        """Return the entry of an operand that does it without any other operand."""
        x = self._level.values[k]
        shape, same = np.shape(x), self._at_same_place(k)
        if same is not None and self._fails({k: same}):
            return Entry(k, self._index)
        numbers = places(x)
        if is_nan(self._level.values[self._value], self._index):
            # Of an infinity and a nan that would both do, nan is the one that did.
            is_inf = np.isinf(wide(x).reshape(-1)[numbers])
            numbers = numbers[np.argsort(is_inf, kind="stable")]

        def fails(count: int) -> bool:
            return self._fails({k: only(shape, numbers[:count])})

        if not fails(len(numbers)):
            return None
        number = numbers[critical(fails, len(numbers))]
        return Entry(k, index_of(number, shape))

    def _at_same_place(self, k: int) -> np.ndarray | None:
        """Most operations work entry by entry: then it is the entry at this index."""
        x = self._level.values[k]
        if np.shape(x) != self._shape or not is_bad(x, self._index):
            return None
        mask = np.zeros(self._shape, bool)
        mask[self._index] = True
        return mask

    def _together(self) -> list[Entry]:
        """Return two entries neither of which does harm without the other."""
        same = {k: self._at_same_place(k) for k in self._bad}
        same = {k: mask for k, mask in same.items() if mask is not None}
        if same and self._fails(same):
            return [Entry(k, self._index) for k in same]
        shapes = [np.shape(self._level.values[k]) for k in self._bad]
        numbers = [places(self._level.values[k]) for k in self._bad]
        ends = np.cumsum([0, *map(len, numbers)])

        def fails(first: int, also: int) -> bool:
            masks = {}
            for k, shape, mine, start in zip(
                self._bad, shapes, numbers, ends, strict=False
            ):
                chosen = np.arange(start, start + len(mine))
                chosen = (chosen < first) | (chosen == also)
                masks[k] = only(shape, mine[chosen])
            return self._fails(masks)

        # The last entry that is needed, and then the one that it needs beside it.
        last = critical(lambda n: fails(n, -1), int(ends[-1]))
        found = [last]
        if not fails(0, last):
            found.append(critical(lambda n: fails(n, last), last))
        entries = []
        for n in sorted(found):
            which = int(np.searchsorted(ends, n, side="right")) - 1
            number = numbers[which][n - ends[which]]
            entries.append(
                Entry(self._bad[which], index_of(int(number), shapes[which]))
            )
        return entries


def cleaned(
    level: Level, op: Executed, kept: dict[int, Any], fill: str = "small"
) -> list:
    """Return the operands with ordinary numbers for their nan and inf."""
    return [
        ordinary(level.values[k], kept.get(k), fill)
        if count_nonfinite(level.values[k])
        else level.values[k]
        for k in op.reads
    ]
