"""What is said of a derivative that is wrong, or that cannot be settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._words.check as _words
from stopgrad_jax._errors import quoted, wrong

from .compare import Direction
from .directions import FEW
from .judge import BORDER, WRONG, Verdict
from .measured import Weighed
from .sites import best_name

_KINDS = {4: "float32", 8: "float64"}


class Teller:
    """Says what is found along the directions of a program's leaves."""

    called: str
    name: str
    places: Mapping[int, str]
    program: Weighed
    along: dict[Direction, Any]

    def wrong_leaf(
        self,
        verdict: Verdict,
        direction: Direction,
        how: str,
        first: Mapping[int, Any] | None = None,
    ) -> AssertionError:
        """Return the error that says what is wrong, or cannot be settled.

        `first`, at second order, is the direction of the slope, by leaf.
        """
        if first is not None and self._is_alone():
            verdict, first = _divided(verdict, first), None
        error = self._wrong_leaf(verdict, direction, how, first is not None)
        if first is not None:
            error.first_directions = tuple(first.values())
        return error

    def _wrong_leaf(
        self, verdict: Verdict, direction: Direction, how: str, of_slope: bool
    ) -> Any:
        numbers = self.numbers(verdict, direction, "JAX")
        of = _words.OF_SLOPE if of_slope else ""
        place = f"{self.place(direction)} ({how}){self.what(direction)}{of}"
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
        dtype = _KINDS[self.program.leaves[direction[0]].dtype.itemsize]
        if verdict.near:
            told = f"{verdict.told / unit:.6g}"
            said = _words.UNSETTLED_KINK.format(place=place, dtype=dtype, told=told)
            kink = self.kink(verdict, direction)
            return self.error(f"{said}{kink}\n  write: {_words.FARTHER}", direction)
        said = _words.UNSETTLED.format(
            place=place,
            dtype=dtype,
            numbers=numbers,
            error=f"{verdict.found.error / unit:.2g}",
        )
        wider = "" if dtype == "float64" else "float64 throughout, or "
        write = _words.SETTLE.format(wider=wider)
        return self.error(f"{said}\n  write: {write}", direction)

    def wrong_rule(
        self, verdict: Verdict, key: int, direction: Direction
    ) -> AssertionError:
        """Return the error of a rule that is not the derivative of its function."""
        site = self.program.sites[key]
        numbers = self.numbers(verdict, direction, "the rule")
        place = self.place(direction)
        said = _words.WRONG_RULE.format(rule=site.shown)
        share = _words.SHARE.format(place=place) + self.what(direction)
        name = best_name(site, self.program.sites)
        return self.error(
            f"{said}: {numbers}{share}{self.kink(verdict, direction)}\n"
            f"  write: {_words.ALLOW.format(name=name)}",
            direction,
        )

    def wrong_value(self, key: int, both: tuple[float, float] | None) -> AssertionError:
        """Return the error of a rule that returns another value than its function."""
        site, numbers = self.program.sites[key], ""
        if both is not None and np.isfinite(both[0]):
            own, told = _apart(*both)
            numbers = _words.VALUES.format(own=own, told=told)
        said = _words.WRONG_VALUE.format(rule=site.shown)
        allow = _words.ALLOW.format(name=best_name(site, self.program.sites))
        return AssertionError(
            f"{self.called}: {said}{numbers}\n  {_words.ELSEWHERE}\n  write: {allow}"
        )

    def _unit(self, direction: Direction) -> float:
        """How much a leaf moves along a direction that is of one entry."""
        if not self._is_entry(direction):
            return 1.0
        return float(np.abs(np.asarray(self.along[direction], np.float64)).sum())

    def _is_alone(self) -> bool:
        """Tell whether there is one number to differentiate by."""
        return sum(np.size(self.program.leaves[k]) for k in self.places) == 1

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
        """Say where the slopes of the two sides differ, if they do."""
        found, unit = verdict.found, self._unit(direction)
        if found is None or verdict.near is None:
            return ""
        if verdict.near:
            most = np.max(np.abs(np.asarray(self.along[direction], np.float64)))
            distance = f"{verdict.near * float(most):.2g}"
            return f"\n  {_words.NEAR_KINK.format(distance=distance)}"
        left, right = f"{found.left / unit:.6g}", f"{found.right / unit:.6g}"
        return f"\n  {_words.AT_KINK.format(left=left, right=right)}"

    def error(self, said: str, direction: Direction) -> Any:
        """Return an error that holds what its numbers are of."""
        error: Any = AssertionError(f"{self.called}: {said}")
        if not self._is_entry(direction):
            error.direction = self.along[direction]
        if not self._is_one(self.program.weights):
            error.weights = tuple(self.program.weights)
        return error

    def no_forward_mode(self) -> TypeError:
        """Return the error for a function that has no forward derivative."""
        sites = self.program.sites.values()
        rules = [site.shown for site in sites if site.is_users and site.reverse_only]
        came = quoted(rules or ["a custom_vjp of JAX's own"])
        return wrong(
            TypeError,
            f"{self.called}, modes=('fwd',)",
            "a function with a forward derivative",
            f"one with a reverse rule only: {came}",
            'modes=("rev",)',
        )


def _divided(verdict: Verdict, first: Mapping[int, Any]) -> Verdict:
    """Return what is found of a second derivative by one number."""
    (by,) = (float(np.asarray(x, np.float64).sum()) for x in first.values())
    found = verdict.found
    if found is not None:
        parts = ("value", "error", "left", "right")
        found = dataclasses.replace(
            found, **{part: getattr(found, part) / by for part in parts}
        )
    return dataclasses.replace(verdict, told=verdict.told / by, found=found)


def _apart(one: float, other: float) -> tuple[str, str]:
    """Write two numbers with the digits that tell them apart."""
    pairs = [(f"{one:.{n}g}", f"{other:.{n}g}") for n in range(6, 18)]
    return next((pair for pair in pairs if len({*pair}) == 2), pairs[0])
