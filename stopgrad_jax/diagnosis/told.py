"""What is said of a derivative that is wrong, or that cannot be settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._words as _words
from stopgrad_jax._engine.measured import Program

from .compare import Direction
from .directions import FEW
from .judge import BORDER, WRONG, Verdict

_KINDS = {4: "float32", 8: "float64"}


class Told:
    """Says what is found along the directions of a program's leaves."""

    called: str
    name: str
    places: Mapping[int, str]
    program: Program
    along: dict[Direction, Any]

    def wrong_leaf(
        self, verdict: Verdict, direction: Direction, how: str
    ) -> AssertionError:
        """Return the error that says what is wrong, or cannot be settled."""
        numbers = self.numbers(verdict, direction, "JAX")
        place = f"{self.place(direction)} ({how}){self.what(direction)}"
        if self.program.is_left_out(verdict.told):
            said = _words.LEFT_OUT.format(place=place, told=f"{verdict.told:.6g}")
            write = _words.NOTHING_FINITE[2].format(name=self.name)
            return self.error(f"{said}\n  write: {write}", direction)
        if verdict.kind == BORDER:
            of = "derivative" if "second" in how else "function"
            if verdict.found is None:  # of neither side is there any
                numbers = numbers.partition(", ")[2]
            names = {"place": place, "of": of, "where": verdict.where}
            said = _words.BORDER.format(**names, numbers=numbers)
            return self.error(f"{said}\n  write: {_words.INSIDE}", direction)
        if verdict.kind == WRONG or verdict.found is None:
            said = _words.WRONG_LEAF.format(place=place)
            kink = self.kink(verdict, direction)
            return self.error(f"{said}: {numbers}{kink}", direction)
        unit = self._unit(direction)
        said = _words.UNSETTLED.format(
            place=place,
            dtype=_KINDS[self.program.leaves[direction[0]].dtype.itemsize],
            numbers=numbers,
            error=f"{verdict.found.error / unit:.2g}",
        )
        return self.error(f"{said}\n  write: {_words.SETTLE}", direction)

    def _unit(self, direction: Direction) -> float:
        """How much a leaf moves along a direction that is of one entry."""
        if not self._is_entry(direction):
            return 1.0
        return float(np.abs(np.asarray(self.along[direction], np.float64)).sum())

    def _is_entry(self, direction: Direction) -> bool:
        return self.program.leaves[direction[0]].size <= FEW

    def place(self, direction: Direction) -> str:
        """Name the leaf, and the entry where they are few."""
        k, n = direction
        leaf = self.program.leaves[k]
        index = list(map(int, np.unravel_index(n, leaf.shape))) if leaf.ndim else ""
        return f"by {self.places[k]}{index if self._is_entry(direction) else ''}"

    def numbers(self, verdict: Verdict, direction: Direction, whom: str) -> str:
        """Give both numbers of a verdict."""
        unit = self._unit(direction)
        true, told = _apart(verdict.value / unit, verdict.told / unit)
        return _words.BY_DIFFERENCES.format(true=true, told=told, whom=whom)

    def what(self, direction: Direction) -> str:
        """Say what a number is, if it is not the derivative of one entry by another."""
        along = "" if self._is_entry(direction) else _words.ALONG
        return along + ("" if self._is_one(self.program.weights) else _words.WEIGHED)

    def _is_one(self, weights: Sequence[Any]) -> bool:
        return sum(np.size(w) for w in weights) == 1

    def kink(self, verdict: Verdict, direction: Direction) -> str:
        """Say where the slopes of the two sides differ."""
        found, unit = verdict.found, self._unit(direction)
        if found is None or not found.is_at_kink:
            return ""
        left, right = f"{found.left / unit:.6g}", f"{found.right / unit:.6g}"
        return f"\n  {_words.AT_KINK.format(left=left, right=right)}"

    def error(self, said: str, direction: Direction) -> AssertionError:
        """Return an error that holds what its numbers are of."""
        error: Any = AssertionError(f"{self.called}: {said}")
        if not self._is_entry(direction):
            error.direction = self.along[direction]
        if not self._is_one(self.program.weights):
            error.weights = tuple(self.program.weights)
        return error


def _apart(one: float, other: float) -> tuple[str, str]:
    """Write two numbers with the digits that tell them apart."""
    pairs = [(f"{one:.{n}g}", f"{other:.{n}g}") for n in range(6, 18)]
    return next((pair for pair in pairs if len({*pair}) == 2), pairs[0])
