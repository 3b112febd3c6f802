"""Small questions about the syntax tree of one function."""

from __future__ import annotations

import ast
from typing import Any

from .bindings import Position, place_of


def operands(node: Any) -> list[Any]:
    """Return the expressions that an operation works on."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.AugAssign):
        return [node.target, node.value]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Subscript):
        return [node.value]
    if isinstance(node, ast.Call):
        own = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return [*own, *node.args, *(k.value for k in node.keywords)]
    return []


def node_at(scope: Any, position: Position) -> Any:
    """Return the expression or statement of a function at a place."""
    nodes = (n for n in ast.walk(scope) if isinstance(n, ast.expr | ast.AugAssign))
    return next((n for n in nodes if place_of(n) == position), None)


def is_root(chain: Any, name: str) -> bool:
    """Tell whether `v`, `v.a` or `v[0].a` is read from a variable."""
    while isinstance(chain, ast.Attribute | ast.Subscript):
        chain = chain.value
    return is_name(chain, name)


def is_name(node: Any, name: str) -> bool:
    """Tell whether an expression is a variable."""
    return isinstance(node, ast.Name) and node.id == name


def is_stored(node: Any) -> bool:
    """Tell whether a variable is assigned."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
