"""Which operands an equation's tangents depend on, asked of JAX's own rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._program.signature import signature

from .absent import cotangents_needed
from .computed import all_that_flows, computed_from
from .linear import restricted
from .reach import Bits, union


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an equation's derivative rule says.

    Attributes:
      dependence: for each result, the operands (as bits) its tangent depends on.
      masks: the tangent is selected by the operands' values, as in relu: it may be
        zero at some inputs.
      refuses: the operands (as bits) by which the rule cannot be differentiated; they
        count in `dependence`.
      always: it raises as soon as one of these moves, not only where a gradient comes.
      reads: for each result, the operands (as bits) whose values its derivative is
        computed with; empty where that is not known.
    """

    dependence: Sequence[Bits]
    masks: bool = False
    refuses: Bits = 0
    always: bool = False
    reads: Sequence[Bits] = ()


class Rules:
    """Asks JAX's own derivative rules which operands a result depends on.

    An equation is differentiated abstractly, once for each signature, and what the
    tangents of its results are computed from is read off that program. So there is
    no table of primitives here, and a rule that changes with JAX changes with it.

    A rule that is told which operands move is asked what `jax.grad` asks it: with just
    those moving that do. Another pattern could make it raise, and leave what JAX keeps
    beside the equation in a state in which the right one fails too.
    """

    _KEEP = 4096
    _known: ClassVar[dict[Any, Answer]] = {}

    def __init__(self) -> None:
        self._here: dict[Any, Answer] = {}

    def __call__(self, eqn: Any, moved: Bits | None = None) -> Sequence[Bits]:
        """Return, for each result, the operands its tangent depends on."""
        return self.answer(eqn, moved).dependence

    def moving(self, eqn: Any, moved: Bits | None = None) -> Sequence[Bits]:
        """Return, for each result, the operands with which JAX takes it to move.

        All results of a custom_vjp do, whatever its rule will return.
        """
        if not _jax.has_own_vjp(eqn):
            return self(eqn, moved)
        everything = sum(1 << k for k in _moved(eqn, None))
        floats = [_jax.is_differentiable(v.aval) for v in eqn.outvars]
        return [everything if is_float else 0 for is_float in floats]

    def by_pattern(self, eqn: Any) -> bool:
        """Tell whether the answer depends on which operands move together."""
        return _jax.sees_which_move(eqn)

    def answer(
        self, eqn: Any, moved: Bits | None = None, cotangents: Bits | None = None
    ) -> Answer:
        """Return what the equation's rule says.

        Args:
          eqn: the equation.
          moved: the operands that move, as bits; all that can, if None.
          cotangents: the results that a gradient comes to; all, if None. If it comes to
            none, JAX still runs the forward half of the rule.
        """
        if (case := chosen(eqn)) is not None:  # a rule cannot see a literal's value
            carries = _jax.is_differentiable(eqn.outvars[0].aval)
            return Answer([1 << case if carries else 0])
        told = _jax.sees_which_move(eqn)
        if not told:
            moved, cotangents = None, 0 if cotangents == 0 else None
        elif moved is None:
            moved = _but_hoisted(eqn)
        # Keys that hold a user's functions or programs live as long as this call.
        private = told or _jax.inner_jaxprs(eqn)
        cache = self._here if private else self._known
        # A rule cannot see the values of literals.
        key = (signature(eqn, literals=False), moved, cotangents)
        if key not in cache:
            if len(cache) >= self._KEEP:
                cache.clear()
            cache[key] = _ask(eqn, moved, cotangents)
        return cache[key]

    def by_source(
        self, eqn: Any, moving: Sequence[Bits] | None, cotangents: Bits | None = None
    ) -> tuple[Answer, Bits]:
        """Ask a rule that is told what moves; return also what it cannot move with.

        `moving` holds the sources (as bits) that each operand moves with. If the rule
        raises where all of them move, it is asked for each source alone, as `jax.grad`
        by that one would.
        """
        if moving is None:
            answer = self.answer(eqn, None, cotangents)
            return answer, -1 if answer.refuses else 0
        together = self.answer(eqn, _pattern(moving), cotangents)
        if not together.refuses:
            return together, 0
        sources, refuses = union(moving), 0
        answers = list[Answer]()
        while sources:
            source = sources & -sources
            sources ^= source
            pattern = _pattern(bits & source for bits in moving)
            answers.append(self.answer(eqn, pattern, cotangents))
            refuses |= source if answers[-1].refuses else 0
        return _united(answers, together.refuses), refuses


def _pattern(moving: Iterable[Bits]) -> Bits:
    """Operands that move, as bits."""
    return sum(1 << k for k, sources in enumerate(moving) if sources)


def chosen(eqn: Any) -> int | None:
    """Return the operand that a selection takes, if a constant decides it."""
    if eqn.primitive.name != "select_n" or not isinstance(eqn.invars[0], _jax.Literal):
        return None
    which = np.asarray(eqn.invars[0].val)
    return 1 + int(which) if which.ndim == 0 else None


def _but_hoisted(eqn: Any) -> Bits:
    """All operands but the arrays that a custom rule's function closes over."""
    return (1 << len(eqn.invars)) - (1 << _hoisted(eqn))


def _hoisted(eqn: Any) -> int:
    """Count the first operands: what a custom rule's function closes over."""
    return eqn.params["num_consts"] if eqn.primitive.name in _jax.CUSTOM else 0


def _moved(eqn: Any, moved: Bits | None) -> list[int]:
    """Numbers of the operands that can move, of those that do."""
    return [
        k
        for k, atom in enumerate(eqn.invars)
        if not isinstance(atom, _jax.Literal)
        and _jax.is_differentiable(atom.aval)
        and (moved is None or moved >> k & 1)
    ]


def _ask(eqn: Any, pattern: Bits | None, cotangents: Bits | None) -> Answer:
    moved = _moved(eqn, pattern)
    results = [k for k, v in enumerate(eqn.outvars) if _jax.is_differentiable(v.aval)]
    if cotangents is not None:
        results = [k for k in results if cotangents >> k & 1]
    if not moved:
        return Answer([0] * len(eqn.outvars))
    closed = [k for k in moved if k < _hoisted(eqn)]
    if closed and _jax.has_own_jvp(eqn):
        # A custom_vjp raises here by itself. A custom_jvp is not called by JAX with
        # what its function closes over: its rule does not know, and `jax.grad` fails.
        bits = sum(1 << k for k in moved)
        dependence = [bits if k in results else 0 for k in range(len(eqn.outvars))]
        return Answer(dependence, refuses=sum(1 << k for k in closed), always=True)
    answer = _ask_together(eqn, moved, results)
    if not answer.refuses or pattern is not None or not moved[1:]:
        return answer
    # Some operands may be to blame, and others not: `igamma(a, x)` by x alone.
    alone = [_ask_together(eqn, [k], results) for k in moved]
    return _united(alone, union(each.refuses for each in alone))


def _united(answers: Sequence[Answer], refuses: Bits) -> Answer:
    """Return what holds where any of these does."""
    known = all(answer.reads for answer in answers)
    return Answer(
        _merged(answer.dependence for answer in answers),
        any(answer.masks for answer in answers),
        refuses,
        any(answer.always for answer in answers),
        _merged(answer.reads for answer in answers) if known else (),
    )


def _merged(tables: Iterable[Sequence[Bits]]) -> list[Bits]:
    return [union(bits) for bits in zip(*tables, strict=True)]


def _ask_together(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    """Ask a rule with all of these operands moving."""
    every = sum(1 << k for k in moved)
    if not results:
        raises = _raises(eqn, moved)
        none = [0] * len(eqn.outvars)
        return Answer(none, refuses=every if raises else 0, always=raises)
    is_vjp = _jax.has_own_vjp(eqn)
    asks = (_ask_forward, _ask_reverse)
    # `jax.jvp` of a custom_vjp raises, whatever its rule is.
    if is_vjp:
        asks = (_ask_reverse,)
    elif eqn.primitive.name == "gate":  # what its rule says is in the transpose
        asks = (_ask_reverse, _ask_forward)
    for ask in asks:
        try:
            answer = ask(eqn, moved, results)
            if ask is _ask_forward:  # a rule may lack its transpose
                _transpose(eqn, moved, results)
        except Exception:  # a rule may raise whatever it likes
            continue
        return answer
    # No rule that works here: JAX will say so if it is ever needed.
    dependence = [every if k in results else 0 for k in range(len(eqn.outvars))]
    return Answer(dependence, refuses=every, always=_raises(eqn, moved))


def _raises(eqn: Any, moved: list[int]) -> bool:
    """Tell whether the forward half of a derivative raises, whatever comes back."""
    results = list(range(len(eqn.outvars)))

    def forward(operands: Any) -> Any:
        primals = [operands[k] for k in moved]
        return jax.vjp(restricted(eqn, operands, moved, results), *primals)[0]

    try:
        _jax.traced_at(eqn, forward, [atom.aval for atom in eqn.invars])
    except Exception:  # whatever it likes
        return True
    return False


def _ask_forward(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    def tangents(operands: Any, moves: Any) -> Any:
        primals = tuple(operands[k] for k in moved)
        return jax.jvp(restricted(eqn, operands, moved, results), primals, moves)[1]

    avals = [atom.aval for atom in eqn.invars]
    moves = tuple(avals[k] for k in moved)
    jaxpr = _jax.traced_at(eqn, tangents, avals, moves)
    skip = len(jaxpr.invars) - len(moves)
    table, reads = [0] * len(eqn.outvars), [0] * len(eqn.outvars)
    for k, bits in zip(results, all_that_flows(jaxpr, _transposed), strict=True):
        table[k] = sum(1 << i for j, i in enumerate(moved) if bits >> skip + j & 1)
        reads[k] = bits & (1 << skip) - 1
    return Answer(table, _is_masked(eqn, jaxpr, len(moves)), reads=reads)


def _transposed(eqn: Any) -> Sequence[Bits]:
    """For each tangent that a gate returns, the operands its cotangent goes to.

    A rule that calls one with its tangents has another transpose than its values say.
    """
    first, count = 0, eqn.params.get("count", 0)
    if eqn.primitive.name == "gate":
        first, count = eqn.params["split"]
    sources = [k for k in _moved(eqn, None) if first <= k < first + count]
    results = list(range(len(eqn.outvars)))
    try:
        return _ask_reverse(eqn, sources, results).dependence
    except Exception:  # whatever the rule raises
        return computed_from(eqn)


def _ask_reverse(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    jaxpr, consts = _jax.opened(_transpose(eqn, moved, results))
    needed = cotangents_needed(jaxpr, consts, len(results))
    table, reads = [0] * len(eqn.outvars), [0] * len(eqn.outvars)
    for i, bits, read in zip(moved, needed, all_that_flows(jaxpr), strict=True):
        for j, k in enumerate(results):
            if bits >> j & 1:
                table[k] |= 1 << i
                reads[k] |= read & (1 << len(eqn.invars)) - 1
    return Answer(table, _is_masked(eqn, jaxpr, len(results)), reads=reads)


def _transpose(eqn: Any, moved: list[int], results: list[int]) -> Any:
    """Trace the backward half of an equation's rule: a closed program."""

    def cotangents(operands: Any, moves: Any) -> Sequence[Any]:
        primals = [operands[k] for k in moved]
        function = restricted(eqn, operands, moved, results)
        return jax.vjp(function, *primals)[1](list(moves))

    avals = [atom.aval for atom in eqn.invars]
    moves = tuple(eqn.outvars[k].aval for k in results)
    return _jax.closed_at(eqn, cotangents, avals, moves)


def _is_masked(eqn: Any, jaxpr: Any, moves: int) -> bool:
    """Tell whether the operands select among the moves, which come after them."""
    literal = [False] * (len(jaxpr.invars) - moves)
    for k, atom in enumerate(eqn.invars):
        literal[k] = isinstance(atom, _jax.Literal)
    flags = [0 if k else _PRIMAL for k in literal] + [_TANGENT] * moves
    return _masks(jaxpr, flags)[1]


_PRIMAL, _TANGENT = 1, 2


def _masks(jaxpr: Any, flags: Sequence[int]) -> tuple[list[int], bool]:
    """Tell what the results depend on, and whether a tangent is masked on the way.

    It is masked by a selection that depends on the operands, between a tangent and
    something that is none (relu), or between constants (max: one half, one or zero).
    """
    env = dict(zip(jaxpr.invars, flags, strict=True))

    def read(atom: Any) -> int:
        return 0 if isinstance(atom, _jax.Literal) else env.get(atom, 0)

    masked = False
    for eqn in jaxpr.eqns:
        operands, inner = [read(atom) for atom in eqn.invars], control(eqn)
        # `jnp.where` is a jitted function, with the selection inside.
        if inner is not None and _jax.jit_name(eqn) is not None:
            out, below = _masks(inner.bodies[0].jaxpr, operands)
            masked |= below
        else:
            out = [functools.reduce(int.__or__, operands, 0)] * len(eqn.outvars)
        if eqn.primitive.name == "select_n" and operands[0]:
            cases = [flags & _TANGENT for flags in operands[1:]]
            constant = not any(operands[1:]) and _jax.is_differentiable(
                eqn.outvars[0].aval
            )
            masked |= constant or (any(cases) and not all(cases))
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], masked
