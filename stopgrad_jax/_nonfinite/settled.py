"""Whether an expression means the same where it is written once more.

A remedy writes the condition of a `where` a second time, at an earlier place or inside
a lambda. Where that might be another value, or have an effect, it is not written.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from stopgrad_jax._source.written import bound, meaning, names_in, place

Names = Sequence[dict[str, Any]]  # what the names of a module mean, by scope

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
    return arguments.union(*map(bound, ast.walk(node)))


def is_plain(node: ast.expr, names: Names) -> bool:
    """Tell an expression that is the same value however often it is written.

    It calls functions of JAX, NumPy and Python alone, and methods of arrays.
    """
    parts = list(ast.walk(node))
    if any(isinstance(part, _NOT_PLAIN) for part in parts):
        return False
    return all(_is_pure(n, names) for n in parts if isinstance(n, ast.Call))


def is_settled(
    function: ast.AST,
    condition: ast.expr,
    where: ast.expr,
    before: ast.expr,
    names: Names,
) -> bool:
    """Tell whether a condition means the same at a place before its own.

    Args:
      function: what both places are in.
      condition: the plain expression.
      where: the call that it is an argument of.
      before: the expression at the earlier place.
      names: what names of the module mean.
    """
    used = names_in(condition)
    after = [n for n in ast.walk(function) if start_of(n) >= place(before)[:2]]
    if used.intersection(*[set().union(*map(bound, after))]):
        return False
    declared = (
        n for n in ast.walk(function) if isinstance(n, ast.Global | ast.Nonlocal)
    )
    if any(used.intersection(n.names) for n in declared):
        return False
    parts = [
        n for n in ast.walk(condition) if isinstance(n, ast.Attribute | ast.Subscript)
    ]
    if all(_is_of_a_module(n, names) for n in parts):
        return True
    # What holds the value may be given another one: by a store, or by a call.
    inside = {n for f in ast.walk(function) if f is not function for n in _body_of(f)}
    stores = [*after, *inside]
    if any(_is_stored(n) for n in stores):
        return False
    between = [n for n in after if start_of(n) < place(where)[:2]]
    calls = [n for n in between if isinstance(n, ast.Call) and not _is_pure(n, names)]
    return not any(used & names_in(call) for call in calls)


def start_of(node: ast.AST) -> tuple[int, int]:
    """Return where a node begins; those without a place are nowhere."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _body_of(node: ast.AST) -> Iterator[ast.AST]:
    return ast.walk(node) if isinstance(node, _FUNCTIONS) else iter(())


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, _PARTS) and not isinstance(node.ctx, ast.Load)


def _is_pure(call: ast.Call, names: Names) -> bool:
    value = meaning(call.func, names)
    if isinstance(value, types.BuiltinFunctionType | type) and value in _BUILTINS:
        return True
    module = value and getattr(value, "__module__", None)
    if str(module).split(".")[0] in _PURE:
        return True
    if isinstance(call.func, ast.Attribute) and not _is_of_a_module(call.func, names):
        return hasattr(jax.Array, call.func.attr)
    return (
        isinstance(call.func, ast.Attribute)
        and value is not None
        and (_root_module(call.func, names) in _PURE)
    )


def _is_of_a_module(node: ast.AST, names: Names) -> bool:
    return bool(_root_module(node, names))


def _root_module(node: Any, names: Names) -> str:
    """Return the package that an attribute is one of, or ""."""
    while isinstance(node, _PARTS):
        node = node.value
    value = meaning(node, names)
    is_module = isinstance(value, types.ModuleType)
    return value.__name__.split(".")[0] if is_module else ""
