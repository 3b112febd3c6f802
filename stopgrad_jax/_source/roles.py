"""What an equation computes in a program that takes gradients: value or derivative.

In a differentiated program stand, in between, the equations of the function's own
value, the slopes that its rules compute on the way, and the backward pass. JAX marks
the last ones only. Those of the value are told by where they lead: to a result, or, if
the value itself is not asked for, to nothing at all; a slope leads to a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import stopgrad_jax._jax as _jax

VALUE = "value"  # a part of the function's own value
COTANGENT = "cotangent"  # depends on what comes back in a backward pass
# else "": a slope, or the value computed once more for the backward pass


def is_backward(eqn: Any) -> bool:
    """Tell those of a backward pass: they have the lines of the forward one."""
    return "transpose" in _jax.transforms_of(eqn)


def value_equations(jaxpr: Any, live: Sequence[bool]) -> dict[int, list[bool]]:
    """Return the equations of the value, and for each which of its results are it.

    `live` tells which results of the program are a part of the value.
    """
    read = {v for eqn in jaxpr.eqns for v in _variables(eqn.invars)}
    read.update(_variables(jaxpr.outvars))
    pairs = zip(jaxpr.outvars, live, strict=True)
    lives = {v for v, is_live in pairs if is_live and not isinstance(v, _jax.Literal)}
    found: dict[int, list[bool]] = {}
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        if is_backward(eqn):
            continue
        flags = [v in lives or v not in read for v in eqn.outvars]
        if any(flags):
            found[index] = flags
            lives.update(_variables(eqn.invars))
    return found


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, _jax.Literal)]
