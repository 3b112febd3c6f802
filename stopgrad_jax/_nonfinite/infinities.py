"""A large number for an infinity that is put in, where nothing tells them apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._source.labels import Labels, Path
from stopgrad_jax._source.roles import is_backward
from stopgrad_jax._source.written import replaced, scopes, with_finfo, written

from .edited import Candidate, Edit, Labeled, bodies, first_that_does, is_in
from .levels import Executed, Level
from .programs import Examined
from .trial import Replaced


def find_large_number(program: Examined, labels: Labels, fun: Any) -> Edit | None:
    """Return the edit that puts in the lowest finite number for -inf."""
    jaxpr, _ = program.source
    found = (
        candidate
        for body in bodies(jaxpr, labels, labels.nowhere, set())
        for candidate in _infinities(body, fun)
        if not Tests(labels, candidate.change).are_in(jaxpr)
    )
    return first_that_does(program, labels, found)


def _infinities(body: Labeled, fun: Any) -> Iterator[Candidate]:
    """Yield an edit for each -inf that is an argument of a `where` or a `full`."""
    for index, eqn in enumerate(body.jaxpr.eqns):
        spots, literals = body.paths[index].spots, map(_literal, eqn.invars)
        if -np.inf not in literals or not spots:
            continue
        function = written(spots[-1])
        node = function.expression(spots[-1]) if function else None
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("where", "full", "full_like"):
            continue
        every = [x for x in node.args if _is_infinity(x)]
        aval = eqn.outvars[0].aval
        if len(every) != 1 or not _jax.is_differentiable(aval):
            continue
        module = with_finfo(node.func.value, scopes(spots[-1], fun))
        if not module:
            continue
        # Of this very dtype: -1e30 is infinite in float16.
        new = f"{module}.finfo({module}.{aval.dtype}).min"
        # `finfo` gives a scalar with a dtype, which promotes where a Python float does
        # not.
        if aval.weak_type:
            new = f"float({new})"
        text = replaced(node, every[0], new)
        users = frozenset(k for k in body.at(spots))
        lowest = float(jax.numpy.finfo(aval.dtype).min)
        edit, change = (
            Edit(ast.unparse(node), text),
            Replaced(body.jaxpr, users, -np.inf),
        )
        yield Candidate(change, lambda _, edit=edit: edit, spots, text, [lowest])


def _literal(atom: Any) -> Any:
    is_number = isinstance(atom, _jax.Literal) and np.ndim(atom.val) == 0
    return atom.val if is_number else None


def _is_infinity(node: ast.expr) -> bool:
    if not isinstance(node, ast.UnaryOp) or not isinstance(node.op, ast.USub):
        return False
    inner = node.operand
    return isinstance(inner, ast.Attribute) and inner.attr in ("inf", "Inf")


# Shapes and dtypes of a largest number that is subtracted.
_AS_IT_IS = frozenset(
    "broadcast_in_dim stop_gradient reshape squeeze convert_element_type max".split()
)


def subtracts_largest(level: Level, op: Executed, alone: bool = False) -> bool:
    """Tell whether an operation takes the largest of some numbers off them.

    `alone`: of them and of no others, as the largest of all the rows before is one.
    """

    def is_largest(value: int) -> bool:
        if value not in level.maker:
            return False
        made = level.ops[level.maker[value]]
        name = made.eqn.primitive.name
        if name == "reduce_max":
            return True
        if alone and len([v for v in made.eqn.invars if _literal(v) is None]) > 1:
            return False
        return name in _AS_IT_IS and any(map(is_largest, made.reads))

    return op.eqn.primitive.name == "sub" and is_largest(op.reads[1])


# What tells an infinity from a large number.
_TESTS = frozenset("eq ne lt le gt ge is_finite".split())
# These are alike for both: zero, or another limit.
_ENDS = frozenset("exp exp2 expm1 logistic tanh erf erfc".split())
# JAX's own, which look for an infinity to keep nan out.
_SOFT = frozenset("softmax log_softmax logsumexp logaddexp logaddexp2".split())


class Tests:
    """The operations that tell a number put in for an infinity from the infinity."""

    def __init__(self, labels: Labels, change: Any) -> None:
        """Follow what a change puts in."""
        self._labels, self._change = labels, change
        self._found = False

    def are_in(self, jaxpr: Any) -> bool:
        """Tell whether there are any, in a program and all inside it."""
        opened = _jax.opened(jaxpr)[0]
        self._follow(opened, self._labels.nowhere, [False] * len(opened.invars))
        return self._found

    def _follow(self, jaxpr: Any, outer: Path, given: Sequence[bool]) -> list[bool]:
        """Return which results come from the number, where these operands do."""
        changed = {v for v, is_it in zip(jaxpr.invars, given, strict=True) if is_it}
        starts = self._change.users if jaxpr is self._change.jaxpr else ()
        for k, eqn in enumerate(jaxpr.eqns):
            if is_backward(eqn):
                continue
            path = self._labels.path(eqn, outer)
            if k in starts:
                literal = any(_literal(a) == -np.inf for a in eqn.invars)
                changed.update(eqn.outvars if literal else ())
            read = [is_in(atom, changed) for atom in eqn.invars]
            inner = control(eqn)
            if inner is not None and not inner.rule:
                out = self._through(eqn, inner, path, read)
                changed.update(
                    v for v, is_it in zip(eqn.outvars, out, strict=True) if is_it
                )
            elif any(read):
                self._found |= self._tells(eqn, path)
                name = _callee(path)
                ends = eqn.primitive.name in _ENDS or name == "softmax"
                changed.update(() if ends or _is_bool(eqn) else eqn.outvars)
        return [is_in(v, changed) for v in jaxpr.outvars]

    def _through(
        self, eqn: Any, inner: Any, path: Path, read: list[bool]
    ) -> list[bool]:
        """Return which results of nested programs come from the number."""
        out = [False] * len(eqn.outvars)
        for body in inner.bodies:
            given, before = [read[k] for k in body.operands], list[bool]()
            results = list[bool]()
            # A loop hands the number on to itself: until it gets no farther.
            while before != given:
                before = list(given)
                results = self._follow(body.jaxpr, path, given)
                for o, i in body.feedback:
                    given[i] = given[i] or results[o]
            for is_it, r in zip(results, body.results, strict=True):
                if r is not None:
                    out[r] = out[r] or is_it
        return out

    def _tells(self, eqn: Any, path: Path) -> bool:
        if eqn.primitive.name not in _TESTS or _callee(path) in _SOFT:
            return False
        if not _jax.is_differentiable(eqn.invars[0].aval):
            return True
        most = float(jax.numpy.finfo(eqn.invars[0].aval.dtype).max) / 2
        literals = [_literal(atom) for atom in eqn.invars]
        # Both are less than such a number.
        return not any(x is not None and abs(x) < most for x in literals)


def _callee(path: Path) -> str:
    spot = path.spots[-1] if path.spots else None
    return spot.called.rpartition(".")[2] if spot else ""


def _is_bool(eqn: Any) -> bool:
    return all(v.aval.dtype == bool for v in eqn.outvars if hasattr(v.aval, "dtype"))
