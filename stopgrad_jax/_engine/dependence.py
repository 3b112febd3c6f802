"""Which operands an equation's tangents depend on, asked of JAX's own rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

import stopgrad_jax._jax as _jax

from .connect import Bits, Reach
from .nested import nested
from .signature import signature


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an equation's derivative rule says.

    Attributes:
      dependence: for each result, the operands (as bits) its tangent depends on.
      masks: the tangent is selected by the operands' values, as in relu: it may be
        zero at some inputs.
      known: there is a rule that works here; without one, all operands count.
    """

    dependence: Sequence[Bits]
    masks: bool = False
    known: bool = True


class Rules:
    """Asks JAX's own derivative rules which operands a result depends on.

    An equation is differentiated abstractly, once for each signature, and what the
    tangents of its results are computed from is read off that program. So there is
    no table of primitives here, and a rule that changes with JAX changes with it.
    """

    _KEEP = 4096
    _known: ClassVar[dict[Any, Answer]] = {}

    def __init__(self) -> None:
        self._here: dict[Any, Answer] = {}

    def __call__(self, eqn: Any) -> Sequence[Bits]:
        """Return, for each result, the operands its tangent depends on."""
        return self.answer(eqn).dependence

    def answer(self, eqn: Any) -> Answer:
        """Return what the equation's rule says."""
        if (case := chosen(eqn)) is not None:  # a rule cannot see a literal's value
            carries = _jax.is_differentiable(eqn.outvars[0].aval)
            return Answer([1 << case if carries else 0])
        # Keys that hold a user's functions or programs live as long as this call.
        cache = self._here if _jax.inner_jaxprs(eqn) else self._known
        key = signature(eqn, literals=False)  # a rule cannot see their values
        if key not in cache:
            if len(cache) >= self._KEEP:
                cache.clear()
            cache[key] = _ask(eqn)
        return cache[key]


def chosen(eqn: Any) -> int | None:
    """Return the operand that a selection takes, if a constant decides it."""
    if eqn.primitive.name != "select_n" or not isinstance(eqn.invars[0], _jax.Literal):
        return None
    which = np.asarray(eqn.invars[0].val)
    return 1 + int(which) if which.ndim == 0 else None


def _ask(eqn: Any) -> Answer:
    moved = [
        k
        for k, atom in enumerate(eqn.invars)
        if not isinstance(atom, _jax.Literal) and _jax.is_differentiable(atom.aval)
    ]
    results = [k for k, v in enumerate(eqn.outvars) if _jax.is_differentiable(v.aval)]
    if not moved or not results:
        return Answer([0] * len(eqn.outvars))
    for ask in (_ask_forward, _ask_reverse, _ask_each):
        try:
            answer = ask(eqn, moved, results)
        except Exception:  # a rule may raise whatever it likes
            continue
        known = not _jax.is_opaque(eqn) or _has_reverse(eqn, moved, results)
        return dataclasses.replace(answer, known=known)
    # No rule that works here: JAX will say so if it is ever needed.
    everything = sum(1 << k for k in moved)
    dependence = [everything if k in results else 0 for k in range(len(eqn.outvars))]
    return Answer(dependence, known=False)


def _has_reverse(eqn: Any, moved: list[int], results: list[int]) -> bool:
    """Tell whether what has a forward rule can be transposed: some kernels cannot."""
    try:
        _ask_reverse(eqn, moved, results)
    except Exception:
        return False
    return True


def _ask_forward(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    def tangents(operands: Any, moves: Any) -> Any:
        primals = tuple(operands[k] for k in moved)
        return jax.jvp(_restricted(eqn, operands, moved, results), primals, moves)[1]

    avals = [atom.aval for atom in eqn.invars]
    moves = tuple(avals[k] for k in moved)
    summary, masks = _flow(eqn, tangents, avals, moves)
    table = [0] * len(eqn.outvars)
    for k, bits in zip(results, summary, strict=True):
        table[k] = sum(1 << i for j, i in enumerate(moved) if bits >> j & 1)
    return Answer(table, masks)


def _ask_each(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    """Ask operand by operand: a rule may refuse some of them (with_backward)."""
    out, masks, known = [0] * len(eqn.outvars), False, False
    for k in moved:
        try:
            asked = _ask_forward(eqn, [k], results)
        except Exception:
            asked = Answer([1 << k if j in results else 0 for j in range(len(out))])
        else:
            known = True
        masks |= asked.masks
        out = [old | new for old, new in zip(out, asked.dependence, strict=True)]
    if not known:
        raise TypeError("no rule at all")
    return Answer(out, masks)


def _ask_reverse(eqn: Any, moved: list[int], results: list[int]) -> Answer:
    def cotangents(operands: Any, moves: Any) -> Any:
        primals = [operands[k] for k in moved]
        function = _restricted(eqn, operands, moved, results)
        return jax.vjp(function, *primals)[1](list(moves))

    avals = [atom.aval for atom in eqn.invars]
    moves = tuple(eqn.outvars[k].aval for k in results)
    summary, masks = _flow(eqn, cotangents, avals, moves)
    table = [0] * len(eqn.outvars)
    for i, bits in zip(moved, summary, strict=True):
        for j, k in enumerate(results):
            table[k] |= (bits >> j & 1) << i
    return Answer(table, masks)


def _restricted(
    eqn: Any, operands: Sequence[Any], moved: list[int], results: list[int]
) -> Callable[..., list[Any]]:
    """Return the equation as a function of some operands, with some results."""

    def function(*values: Any) -> list[Any]:
        everything = list(operands)
        for k, value in zip(moved, values, strict=True):
            everything[k] = value
        out = _jax.bind(eqn, *everything)
        return [out[k] for k in results]

    return function


def _flow(
    eqn: Any, function: Callable[..., Any], operands: Any, moves: Any
) -> tuple[list[Bits], bool]:
    """For each result, the moves (as bits) it is computed from; is any masked?"""
    jaxpr = _jax.traced_at(eqn, function, operands, moves)
    skip = len(jaxpr.invars) - len(moves)
    bits = [bits >> skip for bits in Reach(_everything).summary(jaxpr).results]
    literal = [False] * skip
    for k, atom in enumerate(eqn.invars):
        literal[k] = isinstance(atom, _jax.Literal)
    flags = [0 if k else _PRIMAL for k in literal] + [_TANGENT] * len(moves)
    return bits, _masks(jaxpr, flags)[1]


def _everything(eqn: Any) -> list[Bits]:
    if eqn.primitive.name == "custom_lin":
        raise TypeError("a custom_vjp has no forward rule to read")
    return [(1 << len(eqn.invars)) - 1] * len(eqn.outvars)


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
        operands, inner = [read(atom) for atom in eqn.invars], nested(eqn)
        if eqn.primitive.name == "jit" and inner is not None:
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
