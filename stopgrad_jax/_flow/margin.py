"""The user's own source with the gradient as a pipe in the margin."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from stopgrad_jax._page import Part, underlined
from stopgrad_jax._source.labels import Spot
from stopgrad_jax._source.text import Source

from .analysis import Look
from .grouping import Group
from .steps import short

_LEGEND = "┃ gradient flows   ╳ cut on this line   ┊ no gradient arrives"


def source(look: Look) -> Iterator[list[Part]]:
    """Lay out each function that is told apart, outermost first."""
    functions: dict[Any, _Function] = {}
    grouping = look.grouping
    for number, group in enumerate(grouping.groups):
        if group.spot is None or group.statement is None:
            continue
        key = (group.spot.frame.file, group.spot.function)
        if key not in functions:
            functions[key] = _Function(group.spot, len(group.prefix))
        step = look.step(look.first + number)
        functions[key].add(group, step)
        for depth in range(grouping.root, len(group.prefix)):  # calls that are open
            call = group.prefix[depth]
            key = (call.frame.file, call.function)
            if key not in functions:
                functions[key] = _Function(call, depth)
            functions[key].mark(call, step.flows)
    for spot, words in look.dropped:
        key = (spot.frame.file, spot.function)
        if key in functions:
            functions[key].note(spot, words, "cut")
    if not functions:
        computed = any(group >= 0 for group in look.grouping.group_of)
        why = "the functions were not defined in a file or a cell, or have changed"
        if not computed:
            why = "nothing is computed from the inputs"
        yield [(f"no source: {why}" if computed else why, "dim")]
        return
    for function in sorted(functions.values(), key=lambda f: f.depth):
        yield from function.lines()
    yield [(_LEGEND, "dim")]


class _Function:
    """One function's lines, and what happens on each."""

    def __init__(self, spot: Spot, depth: int) -> None:
        self.name, self.file, self.depth = short(spot.function), spot.file, depth
        self._source: Source = spot.source
        self._marks: dict[int, str] = {}
        self._returns: set[int] = set()
        self._notes: dict[int, list[tuple[Spot, str, str]]] = {}

    def add(self, group: Group, step: Any) -> None:
        """Note a step of this function."""
        if group.spot is not None:
            self.mark(group.spot, step.flows)
        special = group.special
        if special is None or special.kind == "name":
            return
        place = special.path.spots[-1]
        line = place.frame.line
        if special.kind == "cut":
            self._marks[line] = "╳"
            on_purpose = step.reason == "stop_gradient"
            note = "cut on purpose" if on_purpose else f"cut: {special.detail}"
            if not special.detail.startswith("stop_gradient") and on_purpose:
                note = f"cut on purpose: {special.detail}"
            style = "cut"
        else:
            note = f"{special.kind}: {special.detail}"
            if special.kind == "replace":
                note = f"replaced, {special.detail}"
            style = special.kind
        self.note(place, note, style)

    def note(self, place: Spot, words: str, style: str) -> None:
        """Write something below an expression."""
        line = place.frame.line
        self._marks.setdefault(line, "┊")
        notes = self._notes.setdefault(line, [])
        if all(words != other or place is not at for at, other, _ in notes):
            notes.append((place, words, style))

    def mark(self, spot: Spot, flows: bool) -> None:
        """Note whether a gradient passes the statement of an expression."""
        statement = spot.statement
        if statement is not None:
            lines = range(statement.line, statement.end_line + 1)
            if statement.kind == "return":
                self._returns.update(lines)
            for line in lines:
                old = self._marks.get(line, "┊")
                self._marks[line] = "┃" if flows and old == "┊" else old

    def lines(self) -> Iterator[list[Part]]:
        """Yield the head, and each line with its mark and its notes."""
        yield [(self.name, "bold"), (f"   {self.file}", "dim")]
        if "┃" in self._marks.values():  # what flows here, came through a return
            for line in self._returns:
                self._marks[line] = self._marks[line].replace("┊", "┃")
        style = {"┃": "flow", "╳": "cut", "┊": "dim"}
        rows = {k: self._source.rows(k, k)[0][1] for k in sorted(self._marks)}
        common = _indent([text.expandtabs(4) for text in rows.values()])
        for line, text in rows.items():
            mark = self._marks[line]
            first = len(text) - len(text.lstrip())
            whole, _ = underlined(text, first, first, "~")
            pad = " " * (4 + len(text[:first].expandtabs(4)) - common)
            dim = "dim" if mark == "┊" else ""
            left = (f"{line:5} ", "dim")
            yield [left, (mark, style[mark]), (f" {pad}{whole}", dim)]
            for place, note, kind in self._notes.get(line, ()):
                _, col, end_line, end_col = place.position
                start = self._source.column(line, col)
                last = end_line == line
                end = self._source.column(line, end_col) if last else len(text)
                _, marks = underlined(text, start, end, "~")
                bar = "┊" if kind == "cut" else "┃"
                tone = "cut" if kind == "cut" else "flow"
                yield [("      ", ""), (bar, tone), (f" {pad}{marks} {note}", kind)]


def _indent(rows: list[str]) -> int:
    text = "\n".join(row for row in rows if row.strip())
    first = next((row for row in rows if row.strip()), "")
    dedented = textwrap.dedent(text).split("\n")[0]
    return len(first) - len(dedented)
