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
import re
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


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The expression whose value a variable is given.

    Attributes:
      value: its place; of `x += y` that of the whole statement.
      index: for `a, b = f(x)` the position of the variable in it, else None.
      count: how many variables share the value.
      target: the place of the target with all of them.
    """

    value: Position
    index: int | None
    count: int
    target: Position


class Source:
    """One file's text as it is now."""

    def __init__(self, file: str, lines: tuple[str, ...]) -> None:
        self._lines = lines
        self._places: dict[tuple[str, int], set[Any]] = {}
        self._statements: dict[int, list[tuple[Position, ast.AST]]] = {}
        self._expressions: dict[Position, ast.expr] = {}
        self._functions: list[tuple[Position, Any]] = []
        try:
            tree = ast.parse("".join(lines))
            _note_places(compile(tree, file, "exec", dont_inherit=True), self._places)
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._functions.append((_place(node), node))
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
        there, node = self._around(place, in_lambda)
        return self._described(there, node) if node else None

    def assigned(self, place: Position, name: str) -> Assigned | None:
        """Return what the assignment around a place gives to a variable.

        None if it does not assign the variable, or takes a value apart by `*`.
        """
        there, node = self._around(place, False)
        if isinstance(node, ast.AugAssign):
            own = _place(node.target)
            return (
                Assigned(there, None, 1, own) if name in _names(node.target) else None
            )
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            found = _assigned(target, node.value, name)
            if found:
                return found
        return None

    def returned(self, place: Position) -> list[Position]:
        """Return the places of what the function around a place returns."""
        nodes = _own_nodes(self._function(place))
        return [_place(x.value) for x in nodes if isinstance(x, ast.Return) and x.value]

    def computes(self, place: Position, name: str) -> bool:
        """Tell whether the function around a place assigns to a variable."""
        nodes = _own_nodes(self._function(place))
        return any(name in _assigned_names(node) for node in nodes)

    def parts(self, place: Position) -> tuple[Position, ...]:
        """Return the places of the parts of a tuple or list written out there."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Tuple | ast.List):
            return ()
        return tuple(map(_place, node.elts))

    def is_tree(self, place: Position) -> bool:
        """Tell whether a container is written out there."""
        return isinstance(self._expressions.get(place), _DISPLAYS)

    def constructs(self, place: Position) -> bool:
        """Tell whether an object is made there, by the name of its class."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call) or isinstance(node.func, ast.Call):
            return False
        name = self.callee(place)
        return name[:1].isupper() or name in ("dict", "list", "set", "tuple")

    def key(self, place: Position) -> str:
        """Return the key that the expression there has in a dict, or ""."""
        for node in self._expressions.values():
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if key is not None and _place(value) == place:
                        text = isinstance(key, ast.Constant) and str(key.value)
                        return text or self.expression(_place(key))
        return ""

    def name(self, place: Position) -> str:
        """Return the name of the variable that the expression there is, or ""."""
        node = self._expressions.get(place)
        return node.id if isinstance(node, ast.Name) else ""

    def lines_assigning(self, name: str, function: str = "") -> list[int]:
        """Return the lines of the statements, in a function, that assign a variable."""
        found = set[int]()
        for line, group in self._statements.items():
            for place, node in group:
                if place[0] == line and name in _assigned_names(node):
                    around = getattr(self._function(place), "name", "")
                    found |= {line} if function in ("", around) else set()
        return sorted(found)

    def expression(self, place: Position) -> str:
        """Return the text at a place, on one line."""
        line, col, end_line, end_col = place
        if not 0 < line <= end_line <= len(self._lines):
            return ""
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

    def call(self, place: Position) -> tuple[str, str]:
        """Return the function and the only argument of the call there, or ""s."""
        node = self._expressions.get(place)
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return "", ""
        function, argument = node.func, node.args[0]
        dotted = isinstance(function, ast.Name | ast.Attribute)
        text = self.expression(_place(function)) if dotted else ""
        return ("", "") if "(" in text else (text, self.expression(_place(argument)))

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
        return max(around, key=lambda pair: (pair[0][:2], _negated(pair[0][2:])))

    def _function(self, place: Position) -> Any:
        around = [(p, node) for p, node in self._functions if is_within(place, p)]
        return max(around, key=lambda pair: pair[0][:2])[1] if around else None

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


_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
_DISPLAYS = (
    ast.Tuple
    | ast.List
    | ast.Dict
    | ast.Set
    | ast.ListComp
    | ast.DictComp
    | ast.SetComp
    | ast.GeneratorExp
)


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


def is_within(inner: Position, outer: Position) -> bool:
    """Tell whether one place lies in the other."""
    return outer[:2] <= inner[:2] and inner[2:] <= outer[2:]


def _assigned(target: ast.expr, value: Any, name: str) -> Assigned | None:
    own = _place(target)
    if not isinstance(target, ast.Tuple | ast.List):
        return Assigned(_place(value), None, 1, own) if name in _names(target) else None
    if any(isinstance(x, ast.Starred) for x in target.elts):
        return None
    count = len(target.elts)
    for index, part in enumerate(target.elts):
        if name not in _names(part):
            continue
        written = value.elts if isinstance(value, ast.Tuple | ast.List) else ()
        if len(written) == count:
            return _assigned(part, written[index], name)
        nested = isinstance(part, ast.Tuple | ast.List)
        return None if nested else Assigned(_place(value), index, count, own)
    return None


def _assigned_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return set()
    return {name for target in targets for name in _names(target)}


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
