"""One equation as a function of some of its operands, and whether that is linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax

from .computed import all_that_flows
from .reach import union


def restricted(
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


def is_linear(eqn: Any, moved: list[int]) -> bool:
    """Tell whether an equation is linear in some operands, whatever the others are."""
    results = [k for k, v in enumerate(eqn.outvars) if _jax.is_differentiable(v.aval)]

    def tangents(operands: Any, moves: Any) -> Any:
        primals = tuple(operands[k] for k in moved)
        return jax.jvp(restricted(eqn, operands, moved, results), primals, moves)[1]

    avals = [atom.aval for atom in eqn.invars]
    try:
        moves = tuple(avals[k] for k in moved)
        jaxpr = _jax.traced_at(eqn, tangents, avals, moves)
        bits = union(all_that_flows(jaxpr))
    except Exception:  # no forward rule
        return False
    return not any(bits >> k & 1 for k in moved)
