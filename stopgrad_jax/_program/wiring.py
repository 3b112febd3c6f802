"""How the programs in an equation are wired to it; what runs them takes and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

from .crossing import Slot

Trees = Sequence[Any]  # each a tree of arrays; mostly it is one
Made = tuple[list[Any], list[Any]]  # results; what leaves each slot, or None
# A body, run with more than its own operands: which body, its operands, what is given
# for each of its slots or None, what is shared by all bodies.
RunBody = Callable[[int, Trees, Trees, Any], Made]
Lead = Callable[[Any], Any]  # the array, or the number, by which a value decides
At = Callable[[Any, int], Any]  # one step of an operand that is scanned


@dataclasses.dataclass(frozen=True)
class Body:
    """One program inside an equation, and how it is wired to it.

    `operands[i]` is the operand of the equation that feeds its input i, `results[o]`
    the result that its output o feeds (None: it feeds no result). In a loop,
    `feedback` holds (o, i) where output o is input i of the next round; `repeats`: it
    is run again with what is left in references.
    """

    jaxpr: Any
    consts: Sequence[Any]
    operands: Sequence[int]
    results: Sequence[int | None]
    feedback: Sequence[tuple[int, int]] = ()
    repeats: bool = False

    @property
    def is_condition(self) -> bool:
        """It decides whether there is another round, and returns nothing else."""
        return list(self.results) == [None]


@dataclasses.dataclass(frozen=True)
class Extras:
    """What bodies take and hand out besides their operands and results.

    Attributes:
      slots: for each body, its values that something is given for or that leave it.
        They leave with an axis of steps or of devices in front, and as zeros where a
        branch is not taken.
      given: for each slot, body after body: None or what is given, with those axes.
      shared: given to all bodies, the same in all steps and on all devices.
      lead: picks the array of a value that decides on a branch or a round.
    """

    slots: Sequence[Sequence[Slot]] = ()
    given: Trees = ()
    shared: Any = None
    lead: Lead = lambda x: x


PLAIN = Extras()


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of a body: which one, in which step of its loop, and what it is given."""

    body: int
    step: int
    operands: list[Any]


# Yields each round and is sent the results of it; returns, for each result of the
# equation, the value that it is, or one for each step where these are stacked.
Rounds = Generator[Round, Any, list[list[Any]]]


@dataclasses.dataclass(frozen=True)
class Copies:
    """How many values there are of one, over the steps of a scan or over devices."""

    count: int
    devices: bool = False
