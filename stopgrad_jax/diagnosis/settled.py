"""Whether an expression means the same where it is written once more.

A remedy writes the condition of a `where` a second time, at an earlier place or inside
a lambda. Where that might be another value, or have an effect, it is not written.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterator
from typing import Any

import jax

from stopgrad_jax._engine.labels import Spot

from .written import modules, names_in, place

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
# What these hold is evaluated elsewhere, or has an effect.
_NOT_PLAIN = (
    ast.NamedExpr,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
_PARTS = ast.Attribute | ast.Subscript
_PURE = frozenset({"jax", "numpy", "math", "operator"})
_BUILTINS = {abs, bool, float, int, len, max, min, round}


def binds(node: ast.AST) -> set[str]:
    """Return the names that mean something else in a part of an expression."""
    arguments = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return arguments.union(*map(_bound, ast.walk(node)))


def is_plain(node: ast.expr, spot: Spot) -> bool:
    """Tell an expression that is the same value however often it is written.

    It calls functions of JAX, NumPy and Python alone, and methods of arrays.
    """
    parts = list(ast.walk(node))
    if any(isinstance(part, _NOT_PLAIN) for part in parts):
        return False
    return all(_is_pure(n, spot) for n in parts if isinstance(n, ast.Call))


def is_settled(
    function: ast.AST,
    condition: ast.expr,
    where: ast.expr,
    before: ast.expr,
    spot: Spot,
) -> bool:
    """Tell whether a condition means the same at a place before its own.

    Args:
      function: what both places are in.
      condition: the plain expression.
      where: the call that it is an argument of.
      before: the expression at the earlier place.
      spot: the place of one of them.
    """
    names = names_in(condition)
    after = [n for n in ast.walk(function) if place_of(n) >= place(before)[:2]]
    if names.intersection(*[set().union(*map(_bound, after))]):
        return False
    declared = (
        n for n in ast.walk(function) if isinstance(n, ast.Global | ast.Nonlocal)
    )
    if any(names.intersection(n.names) for n in declared):
        return False
    parts = [
        n for n in ast.walk(condition) if isinstance(n, ast.Attribute | ast.Subscript)
    ]
    if all(_is_of_a_module(n, spot) for n in parts):
        return True
    # What holds the value may be given another one: by a store, or by a call.
    inside = {n for f in ast.walk(function) if f is not function for n in _body_of(f)}
    stores = [*after, *inside]
    if any(_is_stored(n) for n in stores):
        return False
    between = [n for n in after if place_of(n) < place(where)[:2]]
    calls = [n for n in between if isinstance(n, ast.Call) and not _is_pure(n, spot)]
    return not any(names & names_in(call) for call in calls)


def place_of(node: ast.AST) -> tuple[int, int]:
    """Return where a node begins; those without a place are nowhere."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _body_of(node: ast.AST) -> Iterator[ast.AST]:
    return ast.walk(node) if isinstance(node, _FUNCTIONS) else iter(())


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, _PARTS) and not isinstance(node.ctx, ast.Load)


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return {node.id}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ExceptHandler) and node.name:
        return {node.name}
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    return set()


def _is_pure(call: ast.Call, spot: Spot) -> bool:
    value = _meaning(call.func, spot)
    if isinstance(value, types.BuiltinFunctionType | type) and value in _BUILTINS:
        return True
    module = value and getattr(value, "__module__", None)
    if str(module).split(".")[0] in _PURE:
        return True
    if isinstance(call.func, ast.Attribute) and not _is_of_a_module(call.func, spot):
        return hasattr(jax.Array, call.func.attr)
    return (
        isinstance(call.func, ast.Attribute)
        and value is not None
        and (_root_module(call.func, spot) in _PURE)
    )


def _is_of_a_module(node: ast.AST, spot: Spot) -> bool:
    return bool(_root_module(node, spot))


def _root_module(node: Any, spot: Spot) -> str:
    """Return the package that an attribute is one of, or ""."""
    while isinstance(node, _PARTS):
        node = node.value
    value = _meaning(node, spot)
    is_module = isinstance(value, types.ModuleType)
    return value.__name__.split(".")[0] if is_module else ""


def _meaning(node: ast.AST, spot: Spot) -> Any:
    """Return what a name of the module, or an attribute of one, is; or None."""
    if isinstance(node, ast.Attribute):
        return getattr(_meaning(node.value, spot), node.attr, None)
    if not isinstance(node, ast.Name):
        return None
    for scope in modules(spot):
        if node.id in scope:
            return scope[node.id]
    return getattr(builtins, node.id, None)
