"""Operands that a function with a custom rule makes nothing of.

The rule of an implicit solver is told the equation and hands its derivative on, but the
function beside it takes what was factorized or solved before, and stopped.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control

from .copies import Copies


def without_ignored(eqn: Any, copies: Copies) -> Copies:
    """Keep at the base what the function of an equation ignores.

    A custom rule has a program that says what is used. What another primitive uses can
    only be tried.
    """
    base, *moved = map(list, copies)
    if _jax.gate_name(eqn):  # its function is not in it
        return [base, *moved]
    used = _used(eqn) if _jax.kind_of(eqn) in _jax.CUSTOM else None
    out = _jax.bind(eqn, *base) if used is None else []
    for there in moved:
        for k, (x, y) in enumerate(zip(base, there, strict=True)):
            if x is y:
                continue
            if used is not None:
                there[k] = y if used[k] else x
                continue
            alone = _jax.bind(eqn, *base[:k], y, *base[k + 1 :])
            pairs = zip(out, alone, strict=True)
            same = jnp.all(jnp.array([jnp.all(a == b) for a, b in pairs]))
            # Both are traced: what is ignored shows only once the numbers are there.
            there[k] = jnp.where(same, x, y)
    return [base, *moved]


def _used(eqn: Any) -> list[bool]:
    inner = control(eqn)
    assert inner is not None
    (body,) = inner.bodies
    used, inputs = [False] * len(eqn.invars), _jax.inputs_used(body.jaxpr)
    for operand, flag in zip(body.operands, inputs, strict=True):
        used[operand] |= flag
    return used
