"""Trace a nonfinite result of a program back to the operation that it was born in.

An entry of an operand is to blame for a nonfinite entry of a result if the result is
finite without it: with ordinary numbers in its place. An entry that stays nonfinite
whatever stands in the place of the nonfinite operands is a *birth*. So a nan that is
masked later, or overwritten, is never reached, and never reported.

Where the way back ends at what was there before (an argument, or an infinity that the
program puts in on purpose, as in a mask), the operation that makes nan of it does the
*harm*; if there is none, the first operation that *takes* it is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control

from .chosen import choosers
from .entries import Index, count_nonfinite, is_bad, is_nan, known
from .levels import Executed, Level
from .stepper import Stepper
from .suspects import Entry, Suspects, cleaned, first_entry


@dataclasses.dataclass(frozen=True)
class Frame:
    """One level on the way to a birth: what was gone back from, and through what.

    `after` holds for each entry the one that it made nonfinite.
    """

    level: Level
    entry: Entry
    after: dict[Entry, Entry]

    @property
    def op(self) -> Executed:
        """The operation that the birth is in, or is."""
        return self.level.ops[self.level.maker[self.entry.value]]


@dataclasses.dataclass(frozen=True)
class Birth:
    """Where a nonfinite value was born, or where a given one first did harm.

    Attributes:
      kind: "birth", "harm" if it makes nan of what was there, "taken" if it only takes
        that on.
      frames: the levels that it lies in, outermost first.
      operands, result: what it computes with, and its nonfinite result.
      source: the operand of the whole program that is taken on, if it is one.
      constant: what is taken on if it is none: a literal, or an array closed over.
    """

    kind: str
    frames: tuple[Frame, ...]
    operands: tuple[Any, ...]
    result: Any
    source: int | None = None
    constant: Any = None

    @property
    def op(self) -> Executed:
        """The operation."""
        return self.frames[-1].op

    @property
    def index(self) -> Index:
        """Where in the result the entry is that was gone back to."""
        return self.frames[-1].entry.index

    @property
    def entries(self) -> tuple[Index | None, ...]:
        """Which entry of each operand the entry of the result is made of.

        None where that is not known: a product of matrices has their shape, too.
        """
        shape = np.shape(self.result)
        if self.op.body is not None or not _jax.is_entrywise(self.op.eqn.primitive):
            return (None,) * len(self.operands)
        return tuple(_entry(np.shape(x), shape, self.index) for x in self.operands)

    @property
    def steps(self) -> tuple[int, ...]:
        """The rounds of the loops that it lies in, outermost first."""
        steps = (frame.op.step for frame in self.frames)
        return tuple(step for step in steps if step is not None)


def _entry(shape: Index, result: Index, index: Index) -> Index | None:
    if not shape:
        return ()
    if len(shape) != len(result):
        return None
    if any(n not in (1, m) for n, m in zip(shape, result, strict=True)):
        return None
    return tuple(k if n > 1 else 0 for k, n in zip(index, shape, strict=True))


def find(stepper: Stepper, level: Level, targets: Sequence[Entry]) -> Birth:
    """Find what makes entries of a level nonfinite: the first birth, if there is one.

    An infinity that a nested program puts in on purpose is no birth, unless nothing
    else explains the targets.
    """
    way = find_way(stepper, level, targets)
    birth, put_in = _first_birth(stepper, way)
    return (
        birth
        or _first_harm(stepper, way)
        or _chosen(stepper, level, way.before)
        or put_in
        or _first_taker(stepper, way)
    )


def _first_birth(stepper: Stepper, way: Way) -> tuple[Birth | None, Birth | None]:
    """Return the first birth on a way, and the first infinity that was put in.

    Which of the two an operation is, is seen only inside of it: it is born of nothing
    nonfinite both where it overflows and where a mask is made in it.
    """
    put_in = None
    for entry in way.in_order(way.born):
        if other := _chosen(stepper, way.level, {entry: []}):
            return other, put_in
        birth = _inside(stepper, way, entry, "birth")
        if birth.kind != "taken":
            return birth, put_in
        put_in = put_in or birth
    return None, put_in


def _first_harm(stepper: Stepper, way: Way) -> Birth | None:
    """Return the first operation that makes nan of infinities.

    A birth that turned out to be put in is one more source of such an infinity.
    """
    harm = way.in_order(e for e in way.before if way.makes_nan(e))
    return _inside(stepper, way, harm[0], "harm") if harm else None


def _first_taker(stepper: Stepper, way: Way) -> Birth:
    """Return the first operation that takes on what was there before."""
    level = way.level
    takers = way.in_order(way.after[e] for e in way.given if e in way.after)
    if not takers:  # a result that is an operand itself
        entry = next(iter(way.given))
        shown = known(level.values[entry.value])
        return Birth("taken", (), (), shown, *_source(level, entry.value))
    entry = takers[0]
    while entry in way.after and _hands_on(stepper, level, entry):
        entry = way.after[entry]
    return _inside(stepper, way, entry, "taken")


def _chosen(
    stepper: Stepper, level: Level, before: dict[Entry, list[Entry]]
) -> Birth | None:
    """Return the birth of another nan because of which one was chosen, if it is one."""
    nans = choosers(level, before)
    birth = find(stepper, level, nans) if nans else None
    return birth if birth is not None and birth.kind == "birth" else None


def _hands_on(stepper: Stepper, level: Level, entry: Entry) -> bool:
    """Whether it leaves an operation as it came in: then a later one is the first.

    JAX 0.10 has a `cond` return what its derivative will read.
    """
    op = level.ops[level.maker[entry.value]]
    inner = stepper.enter(level, op, level.read(op), entry.index)
    if inner is None or op.body is not None:
        return False
    targets = inner_targets(level, op, inner, entry)
    return bool(targets) and all(e.value in inner.given for e in targets)


def targets_of(level: Level, results: Iterable[int]) -> list[Entry]:
    """Return the first nonfinite entry of each of these results of a level."""
    numbers = [k for result in results for k in level.outputs[result]]
    return [entry for k in numbers if (entry := first_entry(level, k)) is not None]


# The way back in one level --------------------------------------------------------


@dataclasses.dataclass
class Way:
    """All that was gone through: `before` holds the entries that made one nonfinite."""

    level: Level
    before: dict[Entry, list[Entry]] = dataclasses.field(default_factory=dict)
    after: dict[Entry, Entry] = dataclasses.field(default_factory=dict)
    born: list[Entry] = dataclasses.field(default_factory=list)
    given: dict[Entry, None] = dataclasses.field(default_factory=dict)

    def in_order(self, entries: Iterable[Entry]) -> list[Entry]:
        """Sort entries by the operations that made them, the first to run first."""
        return sorted(entries, key=lambda e: self.level.maker[e.value])

    def makes_nan(self, entry: Entry) -> bool:
        """Whether an entry is nan and was made so by infinities."""
        made_by, values = self.before[entry], self.level.values
        if not made_by or not is_nan(values[entry.value], entry.index):
            return False
        return not any(is_nan(values[e.value], e.index) for e in made_by)


def find_way(stepper: Stepper, level: Level, targets: Iterable[Entry]) -> Way:
    """Go back from nonfinite entries to where each was born, or was given."""
    way, waiting = Way(level), list(targets)
    while waiting:
        entry = waiting.pop()
        if entry in way.before or entry in way.given:
            continue
        if entry.value not in level.maker:
            way.given[entry] = None
            continue
        guilty = _guilty(stepper, level, entry)
        way.before[entry] = guilty
        if not guilty:
            way.born.append(entry)
        for earlier in guilty:
            # It may have made others nonfinite as well: one way on is enough.
            way.after.setdefault(earlier, entry)
        waiting += guilty
    return way


def _guilty(stepper: Stepper, level: Level, entry: Entry) -> list[Entry]:
    """Return the entries of operands that made one nonfinite; none: it is born."""
    op = level.ops[level.maker[entry.value]]
    return Suspects(level, op, entry).guilty() or _came_in(stepper, level, op, entry)


def _came_in(stepper: Stepper, level: Level, op: Executed, entry: Entry) -> list[Entry]:
    """Return the operands that a program inside of an operation only takes on.

    Every ordinary number in their place may be outside of its domain.
    """
    operands = level.read(op)
    if not any(map(count_nonfinite, operands)):
        return []
    inner = stepper.enter(level, op, operands, entry.index)
    targets = inner_targets(level, op, inner, entry) if inner else []
    if inner is None or not targets:
        return []
    way, found = find_way(stepper, inner, targets), dict[Entry, None]()
    for given in () if way.born else way.given:
        if given.value not in inner.given:  # an infinity that it puts in on purpose
            continue
        value = op.reads[inner.given[given.value]]
        x = level.values[value]
        alike = np.shape(x) == np.shape(inner.values[given.value])
        if alike and is_bad(x, given.index):
            found[Entry(value, given.index)] = None
        elif (first := first_entry(level, value)) is not None:
            found[first] = None
    return list(found)


# Inside an operation --------------------------------------------------------------


def _inside(stepper: Stepper, way: Way, entry: Entry, kind: str) -> Birth:
    """Look into an operation for what of it a birth is."""
    level = way.level
    op = level.ops[level.maker[entry.value]]
    frame = Frame(level, entry, way.after)
    operands = level.read(op)
    if kind == "birth" and any(map(count_nonfinite, operands)):
        operands = cleaned(level, op, {})
    source = constant = None
    if kind == "taken":
        taken = next((e.value for e in _before(way, entry) if e in way.given), None)
        source, constant = _source(level, taken)
    birth = None
    inner = stepper.enter(level, op, operands, entry.index)
    if inner is not None:
        targets = inner_targets(level, op, inner, entry)
        birth = find(stepper, inner, targets) if targets else None
    if birth is not None and birth.frames and (kind, birth.kind) != ("harm", "taken"):
        constant = birth.constant if constant is None else constant
        frames = (frame, *birth.frames)
        return dataclasses.replace(
            birth, frames=frames, source=source, constant=constant
        )
    shown = tuple(map(known, level.read(op)))
    result = known(level.values[entry.value])
    return Birth(kind, (frame,), shown, result, source, constant)


def _before(way: Way, entry: Entry) -> Iterator[Entry]:
    """Yield what made an entry nonfinite, back to what was there before."""
    seen, waiting = {entry}, [entry]
    while waiting:
        for earlier in way.before.get(waiting.pop(), ()):
            if earlier not in seen:
                seen.add(earlier)
                waiting.append(earlier)
                yield earlier


def _source(level: Level, value: int | None) -> tuple[int | None, Any]:
    """Return the operand around the level that a value is, or else its constant."""
    if value is None or value in level.given:
        return (None if value is None else level.given[value]), None
    return None, known(level.values[value])


def inner_targets(
    level: Level, op: Executed, inner: Level, entry: Entry
) -> list[Entry]:
    """Return the entry inside of an operation that one of its results comes from."""
    position, index = op.writes.index(entry.value), entry.index
    opened = control(op.eqn) if op.body is None else None
    shards = inner.context.shards
    if opened and opened.on_devices and shards is not None:
        shape = np.shape(level.values[entry.value])
        index = shards.inside(position, index, shape)
    numbers = inner.outputs[position]
    if opened and opened.is_stacked(position):
        depth = len(shards.sizes) if shards else 0
        numbers = [numbers[index[depth]]]
        index = (*index[:depth], *index[depth + 1 :])
    exact = [Entry(k, index) for k in numbers if is_bad(inner.values[k], index)]
    return exact or [e for k in numbers if (e := first_entry(inner, k)) is not None]
