"""What reads a value that a remedy changes: only the `where` that hides it may.

A remedy is tried out on the one sample that failed. That no other sample is changed by
it, is read off the program: nothing else reads the changed entries. Of the branches of
Python that this sample did not take, it is read off the source.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.labels import Labels, Path
from stopgrad_jax._source.roles import is_backward
from stopgrad_jax._source.text import is_within
from stopgrad_jax._source.written import Position, bound, names_in, place

from .edited import Labeled, is_in, is_where, variables
from .reads import is_of_its_type


def is_hidden(body: Labeled, users: Collection[int], where: Any, branch: int) -> bool:
    """Tell whether what some equations compute is read in a branch of a `where` alone.

    Another `where` with the same condition hides it as well.
    """
    changed, makers = set[Any](), makers_of(body.jaxpr)
    for k, eqn in enumerate(body.jaxpr.eqns):
        if is_backward(eqn):  # it follows what it is the backward pass of
            continue
        read = [j for j, atom in enumerate(eqn.invars) if is_in(atom, changed)]
        hides = is_where(eqn) and read == [branch] and k not in users
        if hides and is_equal(eqn.invars[0], where.invars[0], makers):
            continue
        if read or k in users:
            changed.update(eqn.outvars)
    return not changed.intersection(variables(body.jaxpr.outvars))


def makers_of(jaxpr: Any) -> dict[Any, tuple[Any, int]]:
    """Return what makes each variable: the equation, and which of its results."""
    return {v: (e, k) for e in jaxpr.eqns for k, v in enumerate(e.outvars)}


def is_equal(a: Any, b: Any, makers: dict[Any, tuple[Any, int]]) -> bool:
    """Tell whether two atoms are one value: the same, or computed alike."""
    if isinstance(a, _jax.Literal) or isinstance(b, _jax.Literal):
        both = isinstance(a, _jax.Literal) and isinstance(b, _jax.Literal)
        return both and bool(np.array_equal(a.val, b.val))
    if a is b:
        return True
    if a not in makers or b not in makers:
        return False
    (one, i), (two, j) = makers[a], makers[b]
    # What has an effect may be another value the second time.
    if one.primitive is not two.primitive or i != j or one.effects or two.effects:
        return False
    if str(one.params) != str(two.params) or len(one.invars) != len(two.invars):
        return False
    pairs = zip(one.invars, two.invars, strict=True)
    return all(is_equal(x, y, makers) for x, y in pairs)


def spots_of(jaxpr: Any, labels: Labels, outer: Path, file: str) -> set[Position]:
    """Return the expressions of a file that a program was traced from."""
    found = set[Position]()
    for eqn in _jax.opened(jaxpr)[0].eqns:
        path = labels.path(eqn, outer)
        found.update(s.position for s in path.spots if s.frame.file == file)
        for inner in _jax.programs_in(eqn):
            found |= spots_of(inner, labels, path, file)
    return found


def all_ran(
    function: ast.AST, node: ast.expr, where: ast.expr, ran: set[Position]
) -> bool:
    """Tell whether all that reads a changed value of a function was traced.

    Args:
      function: what the expression and the `where` are in.
      node: the expression that is changed, not inside the `where`.
      where: the call that hides its result.
      ran: the expressions that were traced.
    """
    names, count = set[str](), -1
    units = [(unit, list(_walk(unit, where))) for unit in _units(function)]
    while count < len(names):
        count = len(names)
        for unit, parts in units:
            if node not in parts and not _is_read(unit, parts, names):
                continue
            if not any(is_within(position, place(unit)) for position in ran):
                return False
            names |= _given(parts)
    return True


def _is_read(unit: ast.AST, parts: Sequence[ast.AST], names: set[str]) -> bool:
    """Tell whether the numbers of some names are read in a unit."""
    found = [n for n in parts if isinstance(n, ast.Name) and n.id in names]
    found = [n for n in found if isinstance(n.ctx, ast.Load)]
    return not all(is_of_its_type(unit, n) for n in found)


def _units(function: ast.AST) -> Iterator[ast.AST]:
    """Yield what is run as a whole, or not at all."""
    for node in ast.walk(function):
        yield from _inside(node)


def _inside(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node that may not be run when the rest of it is."""
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return list(node.values[1:])
    if isinstance(node, ast.Lambda):
        return [node.body]
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return [node.elt]
    children = ast.iter_child_nodes(node)
    more = ast.stmt | ast.ExceptHandler | ast.match_case
    return [n for n in children if isinstance(n, more)]


def _walk(unit: ast.AST, where: ast.expr) -> Iterator[ast.AST]:
    """Yield the parts of a unit, without the `where` and the units inside it."""
    waiting = [unit]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr) and is_within(place(node), place(where)):
            continue
        yield node
        inside = _inside(node)
        waiting += [n for n in ast.iter_child_nodes(node) if n not in inside]


def _given(parts: Sequence[ast.AST]) -> set[str]:
    """Return the names that a unit gives a value, or a part of one."""
    found = set[str]()
    for part in parts:
        found |= bound(part)
        targets = getattr(part, "targets", None) or [getattr(part, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute | ast.Subscript):
                found |= names_in(target)
    return found
