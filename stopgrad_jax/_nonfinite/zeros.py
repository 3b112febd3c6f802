"""Whether a zero that is divided by zero on the way back had come back as one.

A rule of the user's may make it itself: of a cotangent that is none, and of an operand
that is zero. Then the rule is to be mended, and not the operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.labels import Labels, Path
from stopgrad_jax._source.roles import COTANGENT, is_backward

from .blame import Birth
from .entries import Index, wide
from .levels import Executed, Level
from .programs import Examined


def comes_back(birth: Birth, program: Examined, labels: Labels) -> bool:
    """Tell whether a division by zero divides a zero that comes back to its call.

    Told only where nothing in between is zero by itself.
    """
    level, op = birth.frames[-1].level, birth.op
    if depends(level, op.reads[1]):
        return False
    levels = [frame.level for frame in birth.frames]
    outer = [frame.op for frame in birth.frames[:-1]]
    calls = _Calls(op.path, _codes(program, labels))
    return _back(levels, outer, op.reads[0], birth.entries[0], calls)


def depends(level: Level, value: int) -> bool:
    """Tell whether a value is made of what comes back, as far as is seen.

    A literal is, among no others: then it is the cotangent of the whole program.
    """
    return value in _dependent(level)


def _dependent(level: Level) -> set[int]:
    found = level.cotangents - level.maker.keys()
    for op in level.ops:
        if (
            op.role == COTANGENT
            and op.reads
            and (not found.isdisjoint(op.reads) or level.literals.issuperset(op.reads))
        ):
            found.update(op.writes)
    return found


def _back(
    levels: Sequence[Level],
    outer: Sequence[Executed],
    value: int,
    index: Index | None,
    calls: _Calls,
) -> bool:
    level = levels[-1]
    dependent = calls.dependent(level)
    if value not in dependent or not _is_zero(level.values[value], index):
        return False
    if not calls.is_new(level, value):
        return False  # it was followed before, and to no end
    if value in level.maker:
        op = level.ops[level.maker[value]]
        if not calls.holds(op.path):
            return True
        same = _jax.is_entrywise(op.eqn.primitive)
        cotangents = [k for k in op.reads if k in dependent]
        others = [k for k in op.reads if k not in dependent]
        if any(_is_zero(level.values[k], index if same else None) for k in others):
            return False
        shape = np.shape(level.values[value])
        each = [
            (k, index if same and np.shape(level.values[k]) == shape else None)
            for k in cotangents
        ]
        zero = all(_is_zero(level.values[k], i) for k, i in each)
        return zero and any(_back(levels, outer, k, i, calls) for k, i in each)
    if not outer or not calls.holds(outer[-1].path):
        return True
    around, number = levels[-2], outer[-1].reads[level.given[value]]
    same = np.shape(around.values[number]) == np.shape(level.values[value])
    return _back(levels[:-1], outer[:-1], number, index if same else None, calls)


def _is_zero(x: Any, index: Index | None) -> bool:
    """Tell whether an entry is zero: all of them, if it is not known which."""
    if _jax.is_key(x):
        return False
    x = wide(x)
    return not np.any(x if index is None or not x.shape else x[index])


class _Calls:
    """The operations that are made in the same call as one on the way back.

    What JAX derives has the place of the call, and so has a `custom_vjp`. A rule whose
    own lines are known has functions that run on the way back alone.
    """

    def __init__(self, path: Path, forward: set[Any]) -> None:
        self._path, self._forward = path, forward
        self._dependent: dict[int, set[int]] = {}
        self._seen: set[tuple[int, int]] = set()

    def dependent(self, level: Level) -> set[int]:
        if id(level) not in self._dependent:
            self._dependent[id(level)] = _dependent(level)
        return self._dependent[id(level)]

    def is_new(self, level: Level, value: int) -> bool:
        before = len(self._seen)
        self._seen.add((id(level), value))
        return len(self._seen) > before

    def holds(self, path: Path) -> bool:
        mine, its = self._rule(self._path), self._rule(path)
        if mine or its:
            return bool(mine & its)
        return self._path.spots[-1:] == path.spots[-1:]

    def _rule(self, path: Path) -> set[Any]:
        return {spot.frame.code for spot in path.spots} - self._forward


def _codes(program: Examined, labels: Labels) -> set[Any]:
    """Return the code of all functions that run forward."""
    jaxpr, _ = program.source
    paths = _paths(_jax.opened(jaxpr)[0], labels, labels.nowhere)
    return {spot.frame.code for path in paths for spot in path.spots}


def _paths(jaxpr: Any, labels: Labels, outer: Path) -> Iterator[Path]:
    for eqn in jaxpr.eqns:
        if is_backward(eqn):
            continue
        path = labels.path(eqn, outer)
        yield path
        for inner in _jax.inner_jaxprs(eqn):
            yield from _paths(_jax.opened(inner)[0], labels, path)
