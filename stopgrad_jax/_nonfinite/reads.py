"""Which written operand of an expression a variable of the program is.

A remedy writes something else for an operand of the source, and is tried out on a
variable of the program. The two are the same only where an operation of JAX reads the
variable in the very expression that the operand is written in, or in a function that is
handed the operand as an argument there.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._source.labels import Labels, Path, Spot
from stopgrad_jax._source.roles import is_backward
from stopgrad_jax._source.text import is_within
from stopgrad_jax._source.written import (
    Written,
    bound,
    is_constant,
    is_read,
    meaning,
    place,
    scopes,
    written,
)

from .edited import Labeled, bodies, is_in, is_where, is_where_call, variables

# These take lists or trees of arrays as well: a name there need not be an array.
_OF_MANY = frozenset(
    "stack concatenate hstack vstack dstack column_stack block array asarray select "
    "choose piecewise multi_dot ravel_pytree stop_gradient device_put "
    "optimization_barrier psum pmean pmax pmin all_gather ppermute map scan while_loop "
    "fori_loop cond switch reduce leaves".split()
)
# What is read of an array without its numbers.
_OF_ITS_TYPE = frozenset({"shape", "ndim", "dtype", "size"})
_LIKE = frozenset("ones_like zeros_like full_like empty_like shape ndim size".split())
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Reading:
    """A body of a program beside the source that it was traced from."""

    def __init__(self, body: Labeled, labels: Labels, fun: Any) -> None:
        """Read a body of the program of `fun`."""
        self._body, self._labels, self._fun = body, labels, fun
        self._makers = {v: k for k, e in enumerate(body.jaxpr.eqns) for v in e.outvars}

    def operands(self, index: int, variable: Any, depth: int) -> list[ast.expr]:
        """Return where an equation's operand is written; [] if that is not certain.

        It is written in the function whose expression is at `depth` in the equation's
        path, at each place in the same way.
        """
        path, eqn = self._body.paths[index], self._body.jaxpr.eqns[index]
        if path.library or len(path.spots) <= depth:
            return []
        if len(path.spots) > depth + 1:
            inner = self.operands(index, variable, depth + 1)
            return _alike([_argument(path.spots, depth, x) for x in inner])
        if not _holds_more(eqn, path, self._labels):
            return self._direct(path, variable, depth)
        return self._handed(eqn, path, variable, depth)

    def _handed(
        self, eqn: Any, path: Path, variable: Any, depth: int
    ) -> list[ast.expr]:
        """Return the arguments by which the bodies of an equation read it."""
        inner, found = control(eqn), list[ast.expr | None]()
        for wired in inner.bodies if inner else ():
            for body in bodies(wired.jaxpr, self._labels, path, set()):
                if body.jaxpr is not wired.jaxpr:
                    continue
                pairs = zip(body.jaxpr.invars, wired.operands, strict=True)
                same = [v for v, k in pairs if eqn.invars[k] is variable]
                reading = Reading(body, self._labels, self._fun)
                for v in same:
                    for k, e in enumerate(body.jaxpr.eqns):
                        if is_in(v, variables(e.invars)):
                            found += reading.operands(k, v, depth) or [None]
        return _alike(found)

    def _direct(self, path: Path, variable: Any, depth: int) -> list[ast.expr]:
        """Return the operands of an expression that JAX itself computes."""
        spot = path.spots[depth]
        function = written(spot)
        node = function.expression(spot) if function else None
        if function is None or node is None:
            return []
        eqns = [
            self._body.jaxpr.eqns[k]
            for k in self._body.at(path.spots)
            if self._body.paths[k].spots == path.spots
        ]
        eqns = [eqn for eqn in eqns if not is_backward(eqn)]
        made = {v for eqn in eqns for v in eqn.outvars}
        if isinstance(node, ast.BinOp | ast.Compare):
            pair = _two(node)
            sides = _sides(eqns, made)
            if len(pair) == 2 and not any(map(is_constant, pair)):
                read = zip(pair, sides, strict=False)
                return _alike([side for side, v in read if v is variable])
        if is_where_call(node) and len(eqns) == 1 and is_where(eqns[0]):
            pairs = zip(node.args, eqns[0].invars, strict=True)
            return _alike([arg for arg, v in pairs if v is variable])
        operands = _operands(node, function, scopes(spot, self._fun))
        read = [v for eqn in eqns for v in variables(eqn.invars)]
        outside = [v for v in dict.fromkeys(read) if v not in made]
        outside = [v for v in outside if _jax.is_differentiable(v.aval)]
        if variable not in outside:
            return []
        from_ = {v: self._made_in(v, path, depth, operands) for v in outside}
        if from_[variable] is not None:
            return _alike([from_[variable]])
        # By elimination: one variable is left, and so is one operand.
        rest = [x for x in operands if all(x is not y for y in from_.values())]
        alone = [v for v in outside if from_[v] is None] == [variable]
        return _alike(rest) if alone else []

    def _made_in(
        self, variable: Any, path: Path, depth: int, operands: Sequence[ast.expr]
    ) -> ast.expr | None:
        """Return the operand that a variable was computed in."""
        if variable not in self._makers:
            return None
        spots = self._body.paths[self._makers[variable]].spots
        if len(spots) <= depth or spots[:depth] != path.spots[:depth]:
            return None
        where = spots[depth].position
        found = [x for x in operands if is_within(where, place(x))]
        return found[0] if len(found) == 1 else None


def occurrences(region: ast.expr, operand: ast.expr) -> list[ast.expr]:
    """Return where an operand is written in a region, as `replaced` finds it."""
    nodes = (n for n in ast.walk(region) if isinstance(n, ast.expr))
    return [n for n in nodes if is_same(n, operand)]


def is_same(node: ast.expr, operand: ast.expr) -> bool:
    """Tell whether an expression is replaced together with an operand."""
    if place(node) == place(operand):
        return True
    return is_read(operand) and ast.dump(node) == ast.dump(operand)


def is_of_its_type(region: ast.AST, node: ast.AST) -> bool:
    """Tell whether what is written there is asked for its shape or dtype alone."""
    for parent in ast.walk(region):
        if node not in ast.iter_child_nodes(parent):
            continue
        if isinstance(parent, ast.Attribute):
            return parent.attr in _OF_ITS_TYPE
        if isinstance(parent, ast.Call) and node in parent.args[:1]:
            return ast.unparse(parent.func).rpartition(".")[2] in _LIKE
    return False


def _alike(found: Sequence[ast.expr | None]) -> list[ast.expr]:
    """Return all of them; none if they are not written alike, or one is unknown."""
    known = [x for x in found if x is not None]
    same = len(known) == len(found) and all(is_same(x, known[0]) for x in known)
    return known if same else []


def _two(node: ast.BinOp | ast.Compare) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    return [node.left, *node.comparators]


def _sides(eqns: Sequence[Any], made: set[Any]) -> list[Any]:
    """Return the variables left and right of an operator, before broadcasting."""
    makers = {v: eqn for eqn in eqns for v in eqn.outvars}
    for eqn in eqns:
        if len(eqn.invars) != 2:
            continue
        sides = list(eqn.invars)
        for k, side in enumerate(sides):
            while not isinstance(side, _jax.Literal) and side in made:
                side = makers[side].invars[0]
            sides[k] = None if isinstance(side, _jax.Literal) else side
        return sides
    return []


def _operands(
    node: ast.expr, function: Written, names: Sequence[dict[str, Any]]
) -> list[ast.expr]:
    """Return the operands of an expression that JAX computes of arrays alone."""
    if isinstance(node, ast.BinOp | ast.Compare):
        return [x for x in _two(node) if not is_constant(x)]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Subscript | ast.Attribute):
        return [node.value]
    if not isinstance(node, ast.Call):
        return []
    given = [*node.args, *(k.value for k in node.keywords)]
    given = [x for x in given if not is_constant(x)]
    if any(isinstance(x, ast.Starred | ast.List | ast.Tuple) for x in given):
        return []
    if _is_of_jax(node.func, function, names):
        return given
    if isinstance(node.func, ast.Attribute) and hasattr(jax.Array, node.func.attr):
        return [node.func.value, *given]
    return []


def _is_of_jax(
    func: ast.expr, function: Written, names: Sequence[dict[str, Any]]
) -> bool:
    """Tell a function of JAX that takes arrays, by the module that it is taken from."""
    if not function.is_module(func):
        return False
    if ast.unparse(func).rpartition(".")[2] in _OF_MANY:
        return False
    found = meaning(func, names)
    if found is abs:
        return True
    module = str(getattr(found, "__module__", ""))
    if found is None:
        module = function.imported_from(func)
    return module.split(".")[0] == "jax" and ".tree" not in module


def _holds_more(eqn: Any, path: Path, labels: Labels) -> bool:
    """Tell whether other code of the user than its expression is in an equation."""
    for inner in _jax.programs_in(eqn):
        for e in _jax.opened(inner)[0].eqns:
            below = labels.path(e, path)
            if below.spots != path.spots or below.library:
                return True
            if _holds_more(e, path, labels):
                return True
    return False


def _argument(
    spots: Sequence[Spot], depth: int, inner: ast.expr | None
) -> ast.expr | None:
    """Return the argument of a call that a parameter of the called function is."""
    here, there = written(spots[depth]), written(spots[depth + 1])
    call = here.expression(spots[depth]) if here else None
    callee = there.function if there else None
    if not isinstance(inner, ast.Name) or not isinstance(call, ast.Call):
        return None
    if not isinstance(callee, _FUNCTIONS) or _is_given_again(callee, inner.id):
        return None
    every = [a.arg for a in (*callee.args.posonlyargs, *callee.args.args)]
    every = every[1:] if every[:1] in (["self"], ["cls"]) else every
    if inner.id not in every or any(isinstance(x, ast.Starred) for x in call.args):
        return None
    alone = len(every) == len(call.args) == 1 and not call.keywords
    if not alone and not _is_called(call, callee):
        return None
    if every.index(inner.id) < len(call.args):
        return call.args[every.index(inner.id)]
    named = (k.value for k in call.keywords if k.arg == inner.id)
    return next(named, None)


def _is_given_again(function: ast.AST, name: str) -> bool:
    return any(name in bound(n) for n in ast.walk(function))


def _is_called(call: ast.Call, callee: ast.AST) -> bool:
    name = getattr(callee, "name", "")
    called = ast.unparse(call.func).rpartition(".")[2]
    return bool(name) and (called == name or name in ("__call__", "__init__"))
