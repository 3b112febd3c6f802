"""A nan that the value of a function does not show, and its gradient does.

The value is made finite again by a selection, a slice, an overwriting, a `nan_to_num`;
the gradient has what was hidden as a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._source.roles import COTANGENT, VALUE

from .blame import Birth, Entry, Frame, find_way, inner_targets
from .entries import (
    FILLS,
    count_nonfinite,
    is_bad,
    is_inexact,
    nonfinite,
    ordinary,
    wide,
)
from .levels import Executed, Level
from .stepper import Stepper


def located(stepper: Stepper, birth: Birth) -> tuple[Frame, ...] | None:
    """Return where in the function's own value a birth is; None: it is not part of it.

    What a backward pass computes once more (`jax.checkpoint`) is looked up in the
    forward pass: the operation of this line that has the same operands.
    """
    if not birth.frames:
        return None
    if birth.op.role == VALUE:
        return birth.frames
    if birth.op.role == COTANGENT or birth.op.body is not None:
        return None
    seen = _Seen(stepper, birth)
    return next(seen.frames(birth.frames[0].level, ()), None)


class _Seen:
    """The operations of the value that are the same as one that was found."""

    def __init__(self, stepper: Stepper, birth: Birth) -> None:
        self._stepper, self._birth = stepper, birth
        self._operands = birth.operands

    def frames(self, level: Level, outer: tuple[Frame, ...]) -> Iterator:
        """Yield the ways to such operations from a level."""
        birth = self._birth
        for op in level.ops:
            if op.role != VALUE:
                continue
            if self._is_same(level, op):
                value = op.writes[birth.op.writes.index(birth.frames[-1].entry.value)]
                if is_bad(level.values[value], birth.index):
                    yield (*outer, Frame(level, Entry(value, birth.index), {}))
            elif self._may_hold(op):
                inner = self._stepper.enter(level, op, level.read(op), birth.index)
                if inner is not None:
                    entry = Entry(op.writes[0], ())
                    yield from self.frames(inner, (*outer, Frame(level, entry, {})))

    def _is_same(self, level: Level, op: Executed) -> bool:
        mine = self._birth.op
        if op.eqn.primitive is not mine.eqn.primitive or op.body is not None:
            return False
        # Not all calls: those around a `jax.checkpoint` are missing in one of the two.
        if op.path.spots[-1:] != mine.path.spots[-1:]:
            return False
        return all(map(_equal, level.read(op), self._operands))

    def _may_hold(self, op: Executed) -> bool:
        return op.body is not None or self._holds(op.eqn)

    def _holds(self, eqn: Any) -> bool:
        inner, wanted = control(eqn), self._birth.op.eqn.primitive
        return inner is not None and any(
            e.primitive is wanted or self._holds(e)
            for body in inner.bodies
            for e in body.jaxpr.eqns
        )


def read_at(
    stepper: Stepper, level: Level, constant: Any, outer: tuple[Frame, ...] = ()
) -> tuple[Frame, ...] | None:
    """Return where the function's own value reads a constant first, if it does.

    A jitted program holds its constants itself, and the derivative holds them again.
    """
    ops = [op for op in level.ops if op.role == VALUE]
    for k in dict.fromkeys(k for op in ops for k in op.reads):
        if k in level.maker or k in level.given:
            continue
        if _is(level.values[k], constant):
            return (*outer, Frame(level, Entry(k, ()), {}))
    for op in ops:
        inner = control(op.eqn)
        bodies = [op.body] if op.body else inner.bodies if inner else []
        if not any(_holds_constant(body, constant) for body in bodies):
            continue
        opened = stepper.enter(level, op, level.read(op))
        if opened is not None:
            around = Frame(level, Entry(op.writes[0], ()), {})
            found = read_at(stepper, opened, constant, (*outer, around))
            if found:
                return found
    return None


def _holds_constant(body: Any, constant: Any) -> bool:
    inner = (control(eqn) for eqn in body.jaxpr.eqns)
    return any(_is(x, constant) for x in body.consts) or any(
        _holds_constant(b, constant) for held in inner if held for b in held.bodies
    )


def _is(x: Any, constant: Any) -> bool:
    if _jax.is_key(x) or np.shape(x) != np.shape(constant) or not is_inexact(x):
        return False
    return np.array_equal(wide(x), wide(constant), equal_nan=True)


def _equal(a: Any, b: Any) -> bool:
    if _jax.is_key(a) or np.shape(a) != np.shape(b):
        return _jax.is_key(a) and _jax.is_key(b)
    if not is_inexact(a):
        return bool(np.array_equal(a, b))
    # Not bit for bit: one of them may have been compiled.
    return bool(np.allclose(wide(a), wide(b), rtol=1e-2, atol=1e-6, equal_nan=True))


# Forward: what hides it -----------------------------------------------------------


def hiders(stepper: Stepper, frames: Sequence[Frame]) -> tuple[list[Executed], bool]:
    """Return the operations of the value at which a nonfinite value is seen no more.

    And whether it is seen nowhere in the end.
    """
    found: list[Executed] = []
    tainted = {frames[-1].entry.value}
    for depth in range(len(frames) - 1, -1, -1):
        level = frames[depth].level
        if not tainted:
            break
        tainted = _follow(stepper, level, tainted, found)
        if depth:  # what leaves it is a result of the operation around
            leaves = [any(k in tainted for k in ks) for ks in level.outputs]
            op = frames[depth - 1].op  # a result for the backward pass only is no value
            results = zip(op.writes, leaves, op.lives, strict=True)
            tainted = {k for k, left, lives in results if left and lives}
    level = frames[0].level
    read = {k for op in level.ops if op.role == VALUE for k in op.reads}
    return found, tainted <= read


def _follow(
    stepper: Stepper, level: Level, start: set[int], found: list[Executed]
) -> set[int]:
    """Follow values through a level; return all that they make nonfinite."""
    tainted = set(start)
    for op in level.ops:
        if op.role != VALUE or not tainted.intersection(op.reads):
            continue
        # It is where the value that is followed comes from.
        if set(op.writes) & tainted:
            continue
        # What is handed to the backward pass only is not seen in the value.
        pairs = zip(op.writes, op.lives, strict=True)
        live = {k for k, lives in pairs if lives and is_inexact(level.values[k])}
        reached = _reached(level, op, tainted, live)
        tainted |= reached
        shown = any(not nonfinite(level.values[k]).all() for k in live)
        if shown and not reached:
            found += _inner(stepper, level, op, tainted)
    return tainted


def _reached(level: Level, op: Executed, tainted: set[int], live: set[int]) -> set[int]:
    """The results of an operation that tainted operands make nonfinite.

    With some ordinary numbers in their place entries of them are finite.
    """
    reached, bad = set[int](), {k for k in live if count_nonfinite(level.values[k])}
    for fill in FILLS if bad else ():
        operands = [
            ordinary(level.values[k], fill=fill) if k in tainted else level.values[k]
            for k in op.reads
        ]
        results = zip(op.writes, op.run(*operands), strict=True)
        reached |= {k for k, x in results if k in bad and _cleared(level.values[k], x)}
        if reached == bad:
            break
    return reached


def _cleared(x: Any, without: Any) -> bool:
    """Whether some nonfinite entries are finite without what makes them so."""
    return bool((nonfinite(x) & ~nonfinite(without)).any())


def _inner(
    stepper: Stepper, level: Level, op: Executed, tainted: set[int]
) -> list[Executed]:
    """Return what inside an operation hides it, if that has a line of its own.

    Else it is the operation. It is none if step by step nothing inside hides it: as it
    is compiled, a product with zero may be a selection.
    """
    inner = stepper.enter(level, op, level.read(op))
    if inner is None:
        return [op]
    start = {n for n, k in inner.given.items() if op.reads[k] in tainted}
    start = {n for n in start if count_nonfinite(inner.values[n])}
    found: list[Executed] = []
    _follow(stepper, inner, start, found)
    own = op.path.spots
    lines = [x for x in found if len(x.path.spots) > len(own) or x.step is not None]
    return lines or [op][: len(found)]


# Backward: what has it as a factor ------------------------------------------------


def factor_of(stepper: Stepper, frames: Sequence[Frame]) -> Executed | None:
    """Return the operation of the backward pass that a nonfinite value comes into."""
    for frame in reversed(frames):
        entry = frame.entry
        while entry in frame.after:
            entry = frame.after[entry]
            op = frame.level.ops[frame.level.maker[entry.value]]
            if op.role == COTANGENT:
                return _reader(stepper, frame.level, op, entry)
    return None


def _reader(stepper: Stepper, level: Level, op: Executed, entry: Entry) -> Executed:
    """Return the operation inside of another that reads what comes from outside."""
    inner = stepper.enter(level, op, level.read(op), entry.index)
    if inner is None:
        return op
    way = find_way(stepper, inner, inner_targets(level, op, inner, entry))
    for given in way.given:
        if given.value in inner.given and given in way.after:
            after = way.after[given]
            reader = inner.ops[inner.maker[after.value]]
            return _reader(stepper, inner, reader, after)
    return op
