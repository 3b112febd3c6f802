"""A function as its author wrote it: its expressions, its names, its modules."""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .bindings import Position, is_within
from .labels import Spot

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Written:
    """The innermost function around an expression."""

    def __init__(self, tree: ast.Module, spot: Spot) -> None:
        """Find the function and the expression."""
        around = [
            node
            for node in ast.walk(tree)
            if isinstance(node, _FUNCTIONS) and is_within(spot.position, place(node))
        ]
        self._tree = tree
        self.function: ast.AST = max(around, key=lambda n: place(n)[:2], default=tree)

    def expression(self, spot: Spot) -> ast.expr | None:
        """Return the expression at a place in it."""
        nodes = (n for n in ast.walk(self.function) if isinstance(n, ast.expr))
        return next((n for n in nodes if place(n) == spot.position), None)

    def is_module(self, node: ast.expr) -> bool:
        """Tell whether an expression is taken from a module, as far as the file says.

        In a notebook the import may be in another cell: a name that this one binds
        nowhere is one, too.
        """
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name):
            return False
        every, name = list(ast.walk(self._tree)), node.id
        alone = all(isinstance(n, ast.alias) for n in every if name in bound(n))
        return alone and not any(
            isinstance(n, ast.arg) and n.arg == name for n in every
        )

    def imported_from(self, node: ast.expr) -> str:
        """Return the module that the file imports a name, or its owner, from; or ""."""
        while isinstance(node, ast.Attribute):
            node = node.value
        name = node.id if isinstance(node, ast.Name) else ""
        for statement in ast.walk(self._tree):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    if name in bound(alias):
                        return getattr(statement, "module", None) or alias.name
        return ""


def written(spot: Spot) -> Written | None:
    """Return the function that an expression is in; None without its source."""
    if not spot.is_current:
        return None
    rows = tuple(text for _, text in spot.source.rows(1, sys.maxsize))
    return Written(_parsed(rows), spot)


@functools.lru_cache(maxsize=32)
def _parsed(rows: tuple[str, ...]) -> ast.Module:
    return ast.parse("\n".join(rows))


def place(node: Any) -> Position:
    """Return where a node of a syntax tree is."""
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def bound(node: ast.AST) -> set[str]:
    """Return the names that a statement or a part of one gives a meaning."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return {node.id}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ExceptHandler) and node.name:
        return {node.name}
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    return set()


def names_in(node: ast.AST) -> set[str]:
    """Return the names that an expression uses."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def is_constant(node: ast.AST) -> bool:
    """Tell a number, or a tuple of numbers, that is written out."""
    if isinstance(node, ast.UnaryOp):
        return is_constant(node.operand)
    if isinstance(node, ast.Tuple | ast.List):
        return all(map(is_constant, node.elts))
    return isinstance(node, ast.Constant)


def operands_of(node: ast.expr) -> list[ast.expr]:
    """Return what an expression computes with, as far as it is not written out."""
    if isinstance(node, ast.Call):
        given = [*node.args, *(k.value for k in node.keywords)]
        found = [x for x in given if not is_constant(x)]
        if not found and isinstance(node.func, ast.Attribute):
            return [node.func.value]
        return [] if any(isinstance(x, ast.Starred) for x in found) else found
    if isinstance(node, ast.BinOp):
        return [x for x in (node.left, node.right) if not is_constant(x)]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    return [node.value] if isinstance(node, ast.Subscript) else []


def is_read(node: ast.expr) -> bool:
    """Tell what is read and not computed: a variable, an attribute or an item."""
    return isinstance(node, ast.Name | ast.Attribute | ast.Subscript)


def replaced(node: ast.expr, old: ast.expr, new: str) -> str:
    """Write an expression with another one for a part of it.

    A variable, an attribute or an item is replaced wherever it is read, anything else
    where it stands.
    """
    # In brackets, it may be on several lines.
    inside = ast.parse(f"({new})", mode="eval").body
    everywhere = is_read(old)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            same = isinstance(node, ast.expr) and place(node) == place(old)
            same = same or (everywhere and ast.dump(node) == ast.dump(old))
            return inside if same else self.generic_visit(node)

    # Of a copy: the tree is kept for the next question, and this changes it.
    return ast.unparse(Replace().visit(copy.deepcopy(node)))


def variables_of(array: np.ndarray, fun: Any, spots: Sequence[Spot]) -> list[str]:
    """Return the variables that a constant may be taken from: all with its numbers.

    They are of the function, or of one of the functions that took it on, as far as
    these read it from their module.
    """
    named = (name for name, x in _scope(fun, spots) if _is_same(x, array))
    return list(dict.fromkeys(named))


def _is_same(x: Any, array: np.ndarray) -> bool:
    if not isinstance(x, np.ndarray | np.generic | jax.Array) or _jax.is_traced(x):
        return False
    if x.shape != array.shape or x.dtype != array.dtype:
        return False
    return np.array_equal(x, array, equal_nan=True)


def _scope(fun: Any, spots: Sequence[Spot]) -> Iterator[tuple[str, Any]]:
    for spot in reversed(spots):
        code = spot.frame.code
        names = code.co_names if code is not None else ()
        for space in modules(spot):
            yield from ((name, space[name]) for name in names if name in space)
    fun = inspect.unwrap(fun)
    code = getattr(fun, "__code__", None)
    if code is not None:
        space, cells = fun.__globals__, fun.__closure__ or ()
        yield from ((name, space[name]) for name in code.co_names if name in space)
        pairs = zip(code.co_freevars, cells, strict=False)
        # To read an empty cell raises.
        yield from ((name, x.cell_contents) for name, x in pairs if x != _EMPTY)


_EMPTY = types.CellType()


def modules(spot: Spot) -> list[dict[str, Any]]:
    """Return what the names of the module mean that an expression is in."""
    every = list(sys.modules.values())
    same = [m for m in every if getattr(m, "__file__", None) == spot.frame.file]
    return [vars(module) for module in same]


def scopes(spot: Spot, fun: Any) -> list[dict[str, Any]]:
    """Return the same, or what they mean to a function where no module has the file."""
    return modules(spot) or [getattr(inspect.unwrap(fun), "__globals__", {})]


def meaning(node: ast.AST, names: Sequence[dict[str, Any]]) -> Any:
    """Return what a name of a module, or an attribute of one, is; or None."""
    if isinstance(node, ast.Attribute):
        return getattr(meaning(node.value, names), node.attr, None)
    if not isinstance(node, ast.Name):
        return None
    for scope in names:
        if node.id in scope:
            return scope[node.id]
    return getattr(builtins, node.id, None)


def with_finfo(module: ast.expr, names: Sequence[dict[str, Any]]) -> str:
    """Return how `finfo` is reached where a function of a module is called, or ""."""
    if hasattr(meaning(module, names), "finfo"):
        return ast.unparse(module)
    return numpy_of(names)


def numpy_of(names: Sequence[dict[str, Any]]) -> str:
    """Return what `jax.numpy` is called among some names, or ""."""
    for scope in names:
        for name, value in list(scope.items()):
            if value is jnp:
                return name
    return ""
