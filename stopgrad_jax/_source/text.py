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
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from .bindings import (
    DISPLAYS,
    STATEMENT,
    Binding,
    Function,
    Position,
    chains_of,
    functions_of,
    head_of,
    is_within,
    names_of,
    place_of,
    root_of,
)


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
        """Note each node by its place; without any, if the text does not parse.

        The text is compiled, too, for the places that its instructions have now.
        """
        self._lines = lines
        self._places: dict[tuple[str, int], set[Any]] = {}
        self._statements: dict[int, list[tuple[Position, ast.AST]]] = {}
        self._expressions: dict[Position, ast.expr] = {}
        self._reads: dict[str, list[Position]] = {}
        self._yields: list[Position] = []
        self._functions: list[Function] = []
        self._around_places: dict[Position, Function] = {}
        self._assignments: dict[Position, list[Binding]] = {}
        try:
            tree = ast.parse("".join(lines))
            # Else the `annotations` of this file would hold there, too.
            _note_places(compile(tree, file, "exec", dont_inherit=True), self._places)
        except (SyntaxError, ValueError):
            return
        self._functions = functions_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt | ast.Lambda):
                is_lambda = isinstance(node, ast.Lambda)
                place = place_of(node.body) if is_lambda else head_of(node)
                for line in range(place[0], place[2] + 1):
                    self._statements.setdefault(line, []).append((place, node))
            elif isinstance(node, ast.expr):
                self._expressions.setdefault(place_of(node), node)
            if isinstance(node, ast.Yield | ast.YieldFrom):
                self._yields.append(place_of(node))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._reads.setdefault(node.id, []).append(place_of(node))

    def is_current(self, code_name: str, first_line: int, place: Position) -> bool:
        """Tell whether the text still has an instruction there."""
        return place in self._places.get((code_name, first_line), ())

    def statement(self, place: Position, in_lambda: bool) -> Statement | None:
        """Return the innermost statement around a place."""
        there, node = self._around(place, in_lambda)
        return self._described(there, node) if node else None

    def function(self, place: Position) -> Function:
        """Return the function whose body a place is in; the file's, if in none."""
        if place not in self._around_places:
            around = [f for f in self._functions if is_within(place, f.body)]
            self._around_places[place] = max(around, key=lambda f: f.body[:2])
        return self._around_places[place]

    def functions(self) -> list[Function]:
        """Return every function of the file."""
        return self._functions[1:]

    def assignments(self, place: Position) -> list[Binding]:
        """Return what the statement around a place assigns, and each `:=` in it."""
        if place not in self._assignments:
            every = self.function(place).bindings if self._functions else ()
            self._assignments[place] = [
                b for b in every if b.how == STATEMENT and is_within(place, b.place)
            ]
        return self._assignments[place]

    def returned(self, place: Position) -> list[Position]:
        """Return the places of what the function around a place returns."""
        nodes = _own_nodes(self.function(place).node)
        return [
            place_of(x.value) for x in nodes if isinstance(x, ast.Return) and x.value
        ]

    def parts(self, place: Position) -> tuple[Position, ...]:
        """Return the places of the parts of a tuple or list written out there."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Tuple | ast.List):
            return ()
        return tuple(map(place_of, node.elts))

    def is_tree(self, place: Position) -> bool:
        """Tell whether a container is written out there."""
        return isinstance(self._expressions.get(place), DISPLAYS)

    def constructs(self, place: Position) -> bool:
        """Tell whether an object is made there, by the name of its class."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call) or isinstance(node.func, ast.Call):
            return False
        name = self.callee(place)
        return name[:1].isupper() or name in ("dict", "list", "set", "tuple")

    def yields(self, place: Position) -> list[Position]:
        """Return the places of each `yield` in the expression or statement there."""
        return [p for p in self._yields if is_within(p, place)]

    def key(self, place: Position) -> str:
        """Return the key that the expression there has in a dict, or ""."""
        for node in self._expressions.values():
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if key is not None and place_of(value) == place:
                        text = isinstance(key, ast.Constant) and str(key.value)
                        return text or self.expression(place_of(key))
        return ""

    def passes_one_on(self, place: Position) -> bool:
        """Tell whether what is there can hand on one expression in it only."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call):
            return True
        return all(isinstance(x, ast.Constant) for x in node.args[1:])

    def name(self, place: Position) -> str:
        """Return the name of the variable that the expression there is, or ""."""
        node = self._expressions.get(place)
        return node.id if isinstance(node, ast.Name) else ""

    def expression(self, place: Position) -> str:
        """Return the text at a place, on one line."""
        line, col, end_line, end_col = place
        if not 0 < line <= end_line <= len(self._lines):
            return ""
        # Python counts columns in bytes of UTF-8.
        rows = [row.encode() for row in self._lines[line - 1 : end_line]]
        rows[-1] = rows[-1][:end_col]
        rows[0] = rows[0][col:]
        text = " ".join(b" ".join(rows).decode(errors="replace").split())
        if rows[1:]:  # as it would stand on one line
            text = re.sub(r",? ([)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", text))
        return text

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

    def called(self, place: Position) -> str:
        """Return the text of the function that the expression there calls, or ""."""
        node = self._expressions.get(place)
        return (
            self.expression(place_of(node.func)) if isinstance(node, ast.Call) else ""
        )

    def call_at(self, place: Position) -> ast.Call | None:
        """Return the call that is there."""
        node = self._expressions.get(place)
        return node if isinstance(node, ast.Call) else None

    def spells(self, place: Position, name: str) -> bool:
        """Tell whether a variable is read in the expression there."""
        return any(is_within(p, place) for p in self._reads.get(name, ()))

    def read_of(self, variables: Iterable[str], place: Position, side: int) -> str:
        """Return the one thing that an expression reads of some variables, or "".

        `v["a"]` and `v.a` are told as they are spelled, or by the name of the variable
        that was given it. Of `a + b` only the one side is looked at, 0 or 1.
        """
        node = self._expressions.get(place)
        if isinstance(node, ast.BinOp) and side in (0, 1):
            node = (node.left, node.right)[side]
        read = {self._part_of(variables, n) for n in chains_of(node)} if node else set()
        return read.pop() if len(read := read - {""}) == 1 else ""

    def operand(self, place: Position, side: int) -> str:
        """Return the text of what an operation or a call there takes, or "".

        Of `a + b` the one side, 0 or 1; of `f(a)` and `a.f()` it is `a`.
        """
        node = self._expressions.get(place)
        if isinstance(node, ast.BinOp) and side in (0, 1):
            node = (node.left, node.right)[side]
        elif isinstance(node, ast.UnaryOp):
            node = node.operand
        elif isinstance(node, ast.Call) and node.args[:1] and not node.args[1:]:
            (node,) = node.args
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = None if node.args else node.func.value
        else:
            return ""
        known = isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call)
        return self.expression(place_of(node)) if known else ""

    def _part_of(self, variables: Iterable[str], chain: ast.expr) -> str:
        """Return how a part of one of the variables is called that is read, or ""."""
        place = place_of(chain)
        known = self.expression(place)
        for _ in range(8):  # variables that were given one another
            root = root_of(chain)
            if root is None or root.id in variables:
                return known if root else ""
            given = self.function(place).binding(root.id)
            before = [b.assigned for b in given if b.place < place]
            if chain is not root or not before or before[-1] is None:
                return ""
            chain = self._expressions.get(before[-1].value, chain)
        return ""

    def call(self, place: Position) -> tuple[str, str]:
        """Return the function and the only argument of the call there, or ""s."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return "", ""
        function, argument = node.func, node.args[0]
        dotted = isinstance(function, ast.Name | ast.Attribute)
        text = self.expression(place_of(function)) if dotted else ""
        return ("", "") if "(" in text else (text, self.expression(place_of(argument)))

    def is_floor_division(self, place: Position) -> bool:
        """Tell whether the expression there is `a // b`."""
        node = self._expressions.get(place)
        return isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv)

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

    def _around(self, place: Position, in_lambda: bool) -> tuple[Position, Any]:
        around = [
            (there, node)
            for there, node in self._statements.get(place[0], ())
            if isinstance(node, ast.Lambda) == in_lambda and is_within(place, there)
        ]
        if not around:
            return place, None
        # The innermost: it begins last, and of those that begin there it ends first.
        return max(around, key=lambda pair: (pair[0][:2], _negated(pair[0][2:])))

    def _described(self, place: Position, node: Any) -> Statement:
        """Say what a statement does; one that has no word for it is its text."""
        targets, parts, value, kind = (), (), None, "expression"
        label = self.expression(place)
        if isinstance(node, ast.Lambda):
            label, value, kind = "return", place_of(node.body), "return"
        elif isinstance(node, ast.Return):
            value = place_of(node.value) if node.value else None
            label, kind = "return", "return"
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            nodes = node.targets if isinstance(node, ast.Assign) else [node.target]
            kind, value = "assignment", place_of(node.value) if node.value else None
            names = [list(names_of(target)) for target in nodes]
            targets = tuple(name for group in names for name in group)
            label = ", ".join(names[0]) or self.expression(place_of(nodes[0]))
            many = isinstance(nodes[0], ast.Tuple | ast.List)
            if many and isinstance(node.value, ast.Tuple | ast.List):
                parts = tuple(map(place_of, node.value.elts))
                parts = parts if len(parts) == len(targets) else ()
            # What `x += y` assigns is written nowhere: `y` is a part of it.
            if isinstance(node, ast.AugAssign):
                value = None
        elif isinstance(node, ast.For | ast.AsyncFor):
            label = "for " + self.expression(place_of(node.target))
        shown = label if len(label) <= 40 else label[:37] + "..."
        return Statement(shown, targets, parts, place[0], place[2], value, kind)


_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


def source_of(file: str) -> Source:
    """Return a file's text as it is now; empty where there is none."""
    if os.path.exists(file) or file.startswith("<"):
        linecache.checkcache(file)
    elif not linecache.getlines(file):  # inside a zip: its module knows how to read it
        for module in list(sys.modules.values()):
            if getattr(module, "__file__", None) == file:
                linecache.lazycache(file, vars(module))
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


def _own_nodes(function: Any) -> Iterator[ast.AST]:
    """Nodes of a function, without those of functions and classes inside it."""
    waiting = list(function.body) if function else []
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _SCOPES):
            waiting += ast.iter_child_nodes(node)


def _negated(place: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-x for x in place)
