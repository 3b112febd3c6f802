"""The double where: what masks a result has to mask its operand as well."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.labels import Labels, Path, Spot
from stopgrad_jax._source.roles import is_backward
from stopgrad_jax._source.text import is_within
from stopgrad_jax._source.written import names_in, place, replaced, scopes, written

from .edited import (
    Candidate,
    Edit,
    Labeled,
    bodies,
    first_that_does,
    is_in,
    is_mapped,
    is_where,
    is_where_call,
    variables,
)
from .programs import Examined
from .readers import all_ran, is_hidden, spots_of
from .reads import Reading, is_of_its_type, is_same, occurrences
from .settled import binds, is_plain, is_settled
from .trial import Masked


def find_double_where(
    program: Examined, labels: Labels, path: Path, operand: int | None, fun: Any
) -> Edit | None:
    """Return the edit that masks the operand of an expression as its result is masked.

    `path` holds the calls that lead to the expression, `operand` is that operand of the
    program that was nonfinite itself, if one was, and `fun` the user's function.
    """
    numbers = (1.0, 0.5, 2.0, 0.0) if operand is None else (0.0, 1.0, 0.5, 2.0)
    jaxpr, _ = program.source
    blamed = set() if operand is None else {jaxpr.invars[operand]}
    candidates = (
        candidate
        for body in bodies(jaxpr, labels, labels.nowhere, blamed)
        for candidate in _maskings(body, path, numbers, labels, fun, jaxpr)
    )
    return first_that_does(program, labels, candidates)


def _maskings(
    body: Labeled,
    path: Path,
    numbers: Sequence[float],
    labels: Labels,
    fun: Any,
    source: Any,
) -> Iterator[Candidate]:
    """Yield what to try for each `where` that masks an expression on the path."""
    for index, eqn in enumerate(body.jaxpr.eqns):
        spots = body.paths[index].spots
        if not is_where(eqn) or not spots:
            continue
        again = [k for k in body.at(spots) if is_where(body.jaxpr.eqns[k])]
        # Of two `where` of one expression it is not known which of them is written.
        function = written(spots[-1]) if again == [index] else None
        where = function.expression(spots[-1]) if function else None
        if function is None or not is_where_call(where):
            continue
        depth = len(spots) - 1
        calls = (body.paths[k].spots for k in body.at(spots[:-1]))
        around = {call[depth] for call in calls if len(call) > depth}
        for spot in around.intersection(path.spots) - {spots[-1]}:
            reading = Reading(body, labels, fun)
            masking = _Masking(reading, body, index, function, where, spots, spot, fun)
            inline = is_within(spot.position, place(where))
            if not inline:
                ran = spots_of(source, labels, labels.nowhere, spot.frame.file)
                node = function.expression(spot)
                if node is None or not all_ran(function.function, node, where, ran):
                    continue
            for change, write, outer, key in masking.edits():
                calls = (*spots[:-1], outer)
                yield Candidate(change, write, calls, (spots[-1], key), numbers)


class _Masking:
    """A `where` and an expression before it in the same function."""

    def __init__(
        self,
        reading: Reading,
        body: Labeled,
        where: int,
        function: Any,
        node: Any,
        spots: Sequence[Spot],
        spot: Spot,
        fun: Any,
    ) -> None:
        self._names, self._reading = scopes(spot, fun), reading
        self._body, self._where, self._function = body, body.jaxpr.eqns[where], function
        self._node, self._spots, self._spot = node, spots, spot
        self._group = body.at([*spots[:-1], spot])

    def edits(self) -> Iterator[tuple[Masked, Any, Spot, Any]]:
        """Yield what to try, how it is written with a number, where, and its key."""
        node = self._function.expression(self._spot)
        branch = self._branch()
        condition = self._where.invars[0]
        if node is None or branch is None or isinstance(condition, _jax.Literal):
            return
        written_there = self._node.args[branch]
        inline = is_within(place(node), place(written_there))
        known = self._is_known(node, inline)
        pairs = list(self._operands(node))
        # What depends on the argument that was nonfinite is the likeliest to be masked.
        pairs.sort(key=lambda pair: pair[0] not in self._body.blamed)
        for variable, operand in pairs:
            whole = inline and isinstance(operand, ast.Name)
            region = written_there if whole else node
            users = self._readers(variable, operand, region)
            if not users or not is_hidden(self._body, users, self._where, branch):
                continue
            shape = condition.aval.shape
            mapped = self._body.mapped or is_mapped(self._where)
            is_open = mapped and shape not in ((), variable.aval.shape)
            means = names_in(operand) | names_in(self._node.args[0])
            is_open = is_open or not known or bool(means & binds(region))
            for index in _indices(shape, variable.aval.shape):
                change = Masked(
                    self._body.jaxpr, users, variable, condition, branch == 1, index
                )
                if change.is_possible:
                    outer = self._node if inline else node
                    write = self._writer(outer, region, operand, branch, index)
                    write = self._told(operand) if is_open else write
                    spot = self._spots[-1] if inline else self._spot
                    yield change, write, spot, (place(operand), branch, str(index))

    def _branch(self) -> int | None:
        """Return which operand of the `where` comes from the expression."""
        jaxpr = self._body.jaxpr
        reached = {v for k in self._group for v in jaxpr.eqns[k].outvars}
        for eqn in jaxpr.eqns:
            read = reached.intersection(variables(eqn.invars))
            if read and not is_backward(eqn):
                reached.update(eqn.outvars)
        found = [k for k, v in enumerate(self._where.invars) if is_in(v, reached)]
        return found[0] if found in ([1], [2]) else None

    def _is_known(self, node: ast.expr, inline: bool) -> bool:
        """Whether the condition can be written where the expression stands."""
        condition = self._node.args[0]
        if not is_plain(condition, self._names):
            return False
        function = self._function.function
        return inline or is_settled(function, condition, self._node, node, self._names)

    def _operands(self, node: ast.expr) -> Iterator[tuple[Any, ast.expr]]:
        """Yield the variables that the expression reads, and how they are written.

        The last one first: of a quotient it is the divisor.
        """
        eqns = [(k, self._body.jaxpr.eqns[k]) for k in self._group]
        eqns = [(k, eqn) for k, eqn in eqns if not is_backward(eqn)]
        made = {v for _, eqn in eqns for v in eqn.outvars}
        found = dict[tuple[Any, str], ast.expr]()
        for k, eqn in eqns:
            for v in variables(eqn.invars):
                if v in made or not _jax.is_differentiable(v.aval):
                    continue
                read = self._reading.operands(k, v, len(self._spots) - 1)
                if read and is_within(place(read[0]), place(node)):
                    found.setdefault((v, ast.dump(read[0])), read[0])
        for (variable, _), operand in reversed(found.items()):
            yield variable, operand

    def _readers(
        self, variable: Any, operand: ast.expr, region: ast.expr
    ) -> frozenset[int]:
        """Return the equations that read another number once the text is replaced.

        None, where it is not certain which they are.
        """
        depth, found, known = len(self._spots) - 1, set[int](), list[ast.expr]()
        for k in self._body.at(self._spots[:-1]):
            spots, eqn = self._body.paths[k].spots, self._body.jaxpr.eqns[k]
            inside = len(spots) > depth and is_within(
                spots[depth].position, place(region)
            )
            if not inside or not is_in(variable, variables(eqn.invars)):
                continue
            read = self._reading.operands(k, variable, depth)
            if not read:
                node = self._function.expression(spots[depth])
                if node is None or occurrences(node, operand):
                    return frozenset()
            elif is_same(read[0], operand):
                found.add(k)
                known += read
        if names_in(operand) & binds(region):  # another variable there: it is not told
            return frozenset(found)
        places = {place(node) for node in known}
        for node in occurrences(region, operand):
            if place(node) not in places and not is_of_its_type(region, node):
                return frozenset()
        return frozenset(found)

    def _told(self, operand: ast.expr) -> Any:
        edit = Edit(ast.unparse(operand), "", ast.unparse(self._node))
        return lambda number: edit

    def _writer(
        self, outer: Any, region: Any, operand: ast.expr, branch: int, index: Any
    ) -> Any:
        def write(number: float) -> Edit:
            where, condition = ast.unparse(self._node.func), self._node.args[0]
            masked = f"{where}({_indexed(condition, index)}, "
            text = ast.unparse(operand)
            masked += f"{text}, {number})" if branch == 1 else f"{number}, {text})"
            new = replaced(region, operand, masked)
            if outer is not region:
                new = replaced(outer, region, new)
            return Edit(ast.unparse(outer), new, ast.unparse(self._node))

        return write


def _indexed(condition: ast.expr, index: tuple[Any, ...] | None) -> str:
    text = ast.unparse(condition)
    if index is None:
        return text
    if not isinstance(condition, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
        text = f"({text})"
    return f"{text}[{', '.join('None' if k is None else ':' for k in index)}]"


def _indices(
    condition: Sequence[int], operand: Sequence[int]
) -> Iterator[tuple[Any, ...] | None]:
    """Yield ways to give a condition the axes of an operand; None: as it is."""

    def fits(shape: Sequence[int]) -> bool:
        try:
            return np.broadcast_shapes(tuple(shape), tuple(operand)) == tuple(operand)
        except ValueError:
            return False

    if fits(condition):
        yield None
    count, rank = len(condition), len(operand)
    if not 0 < count < rank:
        return
    for axes in itertools.combinations(range(rank), count):
        sizes = iter(condition)
        shape = [next(sizes) if k in axes else 1 for k in range(rank)]
        trailing = axes == tuple(range(rank - count, rank))  # is done already
        if fits(shape) and not trailing:
            yield tuple(slice(None) if k in axes else None for k in range(rank))
