"""Values that a later write replaces: `x.at[0].set(w)`, and then `.at[0].set(1.0)`.

JAX's rules hand the tangent of `x` on through every scatter, since a rule cannot see
where the indices of an earlier one pointed. Where all of them are constants of the
program, it can be seen which parts of an array are left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.plan import Plan

_WRITES = ("scatter", "dynamic_update_slice")
_LARGEST = 1 << 20  # entries of an array that is followed
_MOST = 64  # writes to one array that are followed


@dataclasses.dataclass(frozen=True)
class _Part:
    """Entries of an array that may still hold what comes from a variable."""

    where: np.ndarray
    source: Any


class Overwrites:
    """For each jaxpr, the writes that replace something that was written before."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[int, list[Any]]] = {}

    def __call__(self, jaxpr: Any, plan: Plan | None) -> dict[int, list[Any]]:
        """Return, by the number of such a write, the variables that are left in it.

        An array that the plan asks about is one of them, and not what it is made of.
        """
        asked = [m.index for m in plan.matches if m.own] if plan else []
        key = id(jaxpr), tuple(asked)
        if key not in self._known:
            writes = [
                k for k, e in enumerate(jaxpr.eqns) if e.primitive.name in _WRITES
            ]
            consts = plan.consts if plan else ()
            arrays = _Array(jaxpr, consts, asked)
            self._known[key] = arrays.overwrites(writes) if writes else {}
        return self._known[key]


class _Array:
    """What the arrays of a jaxpr hold after each write to them."""

    def __init__(self, jaxpr: Any, consts: Sequence[Any], asked: Sequence[int]) -> None:
        self._eqns = jaxpr.eqns
        self._asked = {v for k in asked for v in jaxpr.eqns[k].outvars}
        self._makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._values = dict(zip(jaxpr.constvars, consts, strict=False))
        self._parts: dict[Any, list[_Part]] = {}

    def overwrites(self, writes: Sequence[int]) -> dict[int, list[Any]]:
        """Return the writes after which something is gone, and what is left then."""
        out = {}
        for index in writes:
            eqn = self._eqns[index]
            operand, update = eqn.invars[0], _updated(eqn)
            size = math.prod(operand.aval.shape)
            everything = math.prod(update.aval.shape) == size
            # A lone write of a part of an array cannot replace all of it.
            if size <= _LARGEST and (everything or self._is_written(operand)):
                left, before = self._written(eqn), self._after(operand)
                is_known = left[0].source is not eqn.outvars[0]
                if is_known and len(left) <= len(before):
                    out[index] = [part.source for part in left]
        return out

    def _is_written(self, atom: Any) -> bool:
        eqn = None if isinstance(atom, _jax.Literal) else self._makers.get(atom)
        is_write = eqn is not None and eqn.primitive.name in _WRITES
        return is_write and atom not in self._asked

    def _after(self, atom: Any) -> list[_Part]:
        """Return the parts of an array, told apart as far as constants tell."""
        if not self._is_written(atom):
            return [_Part(np.ones(atom.aval.shape, bool), atom)]
        return self._written(self._makers[atom])

    def _written(self, eqn: Any) -> list[_Part]:
        """Return the parts of what a write returns."""
        out = eqn.outvars[0]
        everywhere = np.ones(out.aval.shape, bool)
        if out not in self._parts:
            before, where = self._after(eqn.invars[0]), self.written(eqn)
            if len(before) > _MOST:
                return [_Part(everywhere, out)]
            # If it is not known where, all that was there may be left.
            update = _Part(everywhere if where is None else where, _updated(eqn))
            if where is not None:
                before = [_Part(p.where & ~where, p.source) for p in before]
            parts = [p for p in (*before, update) if p.where.any()]
            self._parts[out] = parts
        return self._parts[out]

    def written(self, eqn: Any) -> np.ndarray | None:
        """Return which entries a write writes, or None if that is not known."""
        operand, update = eqn.invars[0], _updated(eqn)
        values = [None if v is operand or v is update else v for v in eqn.invars]
        try:
            with jax.ensure_compile_time_eval():
                values = [None if v is None else self._value(v) for v in values]
                # Ones are written into zeros, and tell where.
                values[0] = np.zeros(operand.aval.shape, operand.aval.dtype)
                ones = np.ones(update.aval.shape, update.aval.dtype)
                values[_update(eqn)] = ones
                (out,) = _jax.bind(eqn, *values)
                return np.asarray(out) != 0
        except Exception:  # not a constant, or an operation that cannot run here
            return None

    def _value(self, atom: Any) -> Any:
        if isinstance(atom, _jax.Literal):
            return atom.val
        if atom not in self._values:
            eqn = self._makers.get(atom)
            small = math.prod(atom.aval.shape) <= 1 << 12
            if eqn is None or eqn.effects or not small:
                raise LookupError
            operands = [self._value(v) for v in eqn.invars]
            results = _jax.bind(eqn, *operands)
            self._values.update(zip(eqn.outvars, results, strict=True))
        return self._values[atom]


def _update(eqn: Any) -> int:
    return 2 if eqn.primitive.name == "scatter" else 1


def _updated(eqn: Any) -> Any:
    return eqn.invars[_update(eqn)]
