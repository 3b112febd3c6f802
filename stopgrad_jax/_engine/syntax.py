"""The user's source text: which statement and expression is at a place in it.

Places come from JAX as line and column of the running instruction. They are trusted
only where the text, compiled again, has an instruction at exactly that place in that
function; a file that was edited after its import then reads as "source changed".
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import linecache
import types
from collections.abc import Iterator
from typing import Any

Position = tuple[int, int, int, int]  # line, column, end line, end column (in bytes)


@dataclasses.dataclass(frozen=True)
class Statement:
    """One statement, or the body of a lambda.

    Attributes:
      label: what it assigns, "return", or the first words of it.
      targets: the variables that it assigns; () if none.
      parts: for `a, b = f(x), g(x)` the places of the parts, one for each target.
      line: its first line; `end_line` its last one.
      value: the place of the whole expression that is assigned or returned.
    """

    label: str
    targets: tuple[str, ...]
    parts: tuple[Position, ...]
    line: int
    end_line: int
    value: Position | None
    kind: str


class Source:
    """One file's text as it is now."""

    def __init__(self, file: str, lines: tuple[str, ...]) -> None:
        self._lines = lines
        self._places: dict[tuple[str, int], set[Any]] = {}
        self._statements: dict[int, list[tuple[Position, ast.AST]]] = {}
        self._expressions: dict[Position, ast.expr] = {}
        try:
            tree = ast.parse("".join(lines))
            _note_places(compile(tree, file, "exec", dont_inherit=True), self._places)
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt):
                place = _own_place(node)
                for line in range(place[0], place[2] + 1):
                    self._statements.setdefault(line, []).append((place, node))
            elif isinstance(node, ast.Lambda):
                place = _place(node.body)
                for line in range(place[0], place[2] + 1):
                    self._statements.setdefault(line, []).append((place, node))
            elif isinstance(node, ast.expr):
                self._expressions.setdefault(_place(node), node)

    def is_current(self, code_name: str, first_line: int, place: Position) -> bool:
        """Tell whether the text still has an instruction there."""
        return place in self._places.get((code_name, first_line), ())

    def statement(self, place: Position, in_lambda: bool) -> Statement | None:
        """Return the innermost statement around a place."""
        around = [
            (there, node)
            for there, node in self._statements.get(place[0], ())
            if isinstance(node, ast.Lambda) == in_lambda and _is_within(place, there)
        ]
        if not around:
            return None
        there, node = max(around, key=lambda pair: (pair[0][:2], _negated(pair[0][2:])))
        return self._described(there, node)

    def expression(self, place: Position) -> str:
        """Return the text at a place, on one line."""
        line, col, end_line, end_col = place
        if not 0 < line <= end_line <= len(self._lines):
            return ""
        rows = [row.encode() for row in self._lines[line - 1 : end_line]]
        rows[-1] = rows[-1][:end_col]
        rows[0] = rows[0][col:]
        return " ".join(b" ".join(rows).decode(errors="replace").split())

    def callee(self, place: Position) -> str:
        """Return the name of the function that the expression there calls, or ""."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call):
            return ""
        function = node.func
        while isinstance(function, ast.Call):
            function = function.func
        if isinstance(function, ast.Attribute):
            return function.attr
        return function.id if isinstance(function, ast.Name) else ""

    def is_comparison(self, place: Position) -> bool:
        """Tell whether the expression there is `a < b` or the like."""
        return isinstance(self._expressions.get(place), ast.Compare)

    def rows(self, line: int, end_line: int) -> list[tuple[int, str]]:
        """Return the numbered lines of the text in that range."""
        last = min(end_line, len(self._lines))
        return [(k, self._lines[k - 1].rstrip()) for k in range(line, last + 1)]

    def column(self, line: int, offset: int) -> int:
        """Turn an offset in bytes into one in characters."""
        if not 0 < line <= len(self._lines):
            return offset
        return len(self._lines[line - 1].encode()[:offset].decode(errors="ignore"))

    def _described(self, place: Position, node: Any) -> Statement:
        targets, parts, value, kind = (), (), None, "expression"
        label = self.expression(place)
        if isinstance(node, ast.Lambda):
            label, value, kind = "return", _place(node.body), "return"
        elif isinstance(node, ast.Return):
            value = _place(node.value) if node.value else None
            label, kind = "return", "return"
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            nodes = node.targets if isinstance(node, ast.Assign) else [node.target]
            kind, value = "assignment", _place(node.value) if node.value else None
            names = [list(_names(target)) for target in nodes]
            targets = tuple(name for group in names for name in group)
            label = ", ".join(names[0]) or self.expression(_place(nodes[0]))
            many = isinstance(nodes[0], ast.Tuple | ast.List)
            if many and isinstance(node.value, ast.Tuple | ast.List):
                parts = tuple(map(_place, node.value.elts))
                parts = parts if len(parts) == len(targets) else ()
            if isinstance(node, ast.AugAssign):
                value = None
        elif isinstance(node, ast.For | ast.AsyncFor):
            label = "for " + self.expression(_place(node.target))
        shown = label if len(label) <= 40 else label[:37] + "..."
        return Statement(shown, targets, parts, place[0], place[2], value, kind)


def source_of(file: str) -> Source:
    """Return a file's text as it is now; empty where there is none."""
    linecache.checkcache(file)
    return _parsed(file, tuple(linecache.getlines(file)))


@functools.lru_cache(maxsize=128)
def _parsed(file: str, lines: tuple[str, ...]) -> Source:
    return Source(file, lines)


def _note_places(code: types.CodeType, places: dict[tuple[str, int], set]) -> None:
    key = (code.co_name, code.co_firstlineno)
    places.setdefault(key, set()).update(_ordered(p) for p in code.co_positions())
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            _note_places(inner, places)


def _ordered(place: tuple[int | None, ...]) -> tuple[int | None, ...]:
    line, end_line, col, end_col = place
    return (line, col, end_line, end_col)


def _place(node: Any) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _own_place(node: Any) -> Position:
    """Place of a statement; of a compound one its head only."""
    line, col, end_line, end_col = _place(node)
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        first = min((_place(x)[:2] for x in body), default=(end_line, end_col))
        if getattr(body[0], "decorator_list", None):
            first = _place(body[0].decorator_list[0])[:2]
        end_line, end_col = first
    return line, col, end_line, end_col


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _names(part)
    elif isinstance(target, ast.Starred):
        yield from _names(target.value)
    elif isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute):
        yield ast.unparse(target)


def _is_within(inner: Position, outer: Position) -> bool:
    return outer[:2] <= inner[:2] and inner[2:] <= outer[2:]


def _negated(place: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-x for x in place)
