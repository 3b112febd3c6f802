"""Look through a program for what makes its results nonfinite, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .blame import Birth, Entry, Frame, find, targets_of
from .entries import Index, index_of, known, places
from .hiding import factor_of, hiders, located, read_at
from .levels import Executed, Level
from .programs import Culprit, Examined
from .stepper import Stepper


@dataclasses.dataclass(frozen=True)
class Constant:
    """A nonfinite entry of a constant of the function; `value` is all of it."""

    value: Any
    index: Index


@dataclasses.dataclass(frozen=True)
class Finding:
    """What makes results of a program nonfinite.

    Attributes:
      program: the program, and `reaches` its nonfinite results.
      given: the entry of an argument that was nonfinite before, if that is the cause.
      constant: that of a constant, if that is.
      birth: where it was born, or where what was given does harm; None if the program
        is finite step by step.
      side: "forward", or "backward" if it was born in a derivative.
      hidden: the operations that hide it from the function's value, if any do.
      factor: the operation of a backward pass that has it as a factor, if one does.
      by_steps: it is so only where the operations run one by one.
    """

    program: Examined
    reaches: tuple[str, ...]
    given: Culprit | None = None
    constant: Constant | None = None
    birth: Birth | None = None
    side: str = "forward"
    hidden: tuple[Executed, ...] = ()
    factor: Executed | None = None
    by_steps: bool = False


def search(program: Examined, stepper: Stepper, by_steps: bool = False) -> Finding:
    """Find out why results of a program are nonfinite, as compiled or step by step."""
    wrong = program.wrong_by_steps if by_steps else program.wrong
    reaches = tuple(program.results[k] for k in wrong)
    given = None if by_steps else program.given()
    operands = given.operands if given else program.operands
    level = stepper.top(
        program.jaxpr, program.consts, operands, cotangents=program.cotangents
    )
    targets = targets_of(level, wrong)
    if not targets:  # it is so only as it is compiled
        return Finding(program, reaches, given)
    birth = find(stepper, level, targets)
    if given is None and birth.kind != "birth" and birth.source in program.names:
        given = _given(program, birth.source)
    frames = located(stepper, birth)
    start, constant = birth.frames, None
    if given:
        (value,) = (n for n, k in level.given.items() if k == given.operand)
        start = frames = (_where_read(level, birth, Entry(value, given.index)),)
    elif frames is None or birth.kind == "taken":
        constant, entry = _constant(level, birth)
        if entry and constant:
            start = (_where_read(level, birth, entry),)
            frames = read_at(stepper, level, constant.value)
    came_in = given or constant or not birth.frames
    side = "forward" if came_in or frames else "backward"
    factor = factor_of(stepper, start)
    hidden: Sequence[Executed] = ()
    if factor is not None and frames:
        hidden, everywhere = hiders(stepper, frames)
        # Seen in one result it is not hidden, whatever hides it in another.
        hidden = hidden if everywhere else ()
    hidden = tuple(hidden)
    return Finding(
        program, reaches, given, constant, birth, side, hidden, factor, by_steps
    )


def _given(program: Examined, operand: int) -> Culprit:
    """Describe an operand that is nonfinite, and is not the only cause."""
    x = program.operands[operand]
    numbers = places(x)
    index = tuple(map(int, np.unravel_index(numbers[0], np.shape(x))))
    value = np.asarray(x)[index]
    return Culprit(operand, index, value, len(numbers) - 1, program.operands)


def _where_read(level: Level, birth: Birth, exact: Entry) -> Frame:
    """Return where a value that came in is read: this entry of it, or another one."""
    after = birth.frames[0].after if birth.frames else {}
    entries = [entry for entry in after if entry.value == exact.value]
    entry = exact if exact in entries or not entries else entries[0]
    return Frame(level, entry, after)


def _constant(level: Level, birth: Birth) -> tuple[Constant | None, Entry | None]:
    """Return the constant that is to blame, and its entry if the whole program has it.

    A single number that turns to nan, as the infinity of a mask, is put in on purpose.
    """
    for entry in birth.frames[0].after if birth.frames else ():
        if entry.value in level.maker or entry.value in level.given:
            continue
        x = known(level.values[entry.value])
        if (birth.kind == "taken" or np.ndim(x)) and _leads(birth.frames[0], entry):
            return Constant(x, entry.index), entry
    x = birth.constant
    if birth.kind != "taken" or x is None:
        return None, None
    return Constant(x, index_of(places(x)[0], np.shape(x))), None


def _leads(frame: Frame, entry: Entry) -> bool:
    """Tell whether an entry is one of those that made what a frame went back from."""
    while entry != frame.entry:
        if entry not in frame.after:
            return False
        entry = frame.after[entry]
    return True
