"""Mutable array references: what is left in one after an equation has touched it.

A reference is followed as if it were a value that each write replaces. What is written
to a part of it adds to what it holds; what is written to all of it replaces that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.wiring import Body


def refs_of(jaxpr: Any) -> list[int]:
    """Return the numbers of the inputs that are references."""
    return [k for k, v in enumerate(jaxpr.invars) if _jax.is_ref(v.aval)]


def fed_back(body: Body) -> list[tuple[int, int]]:
    """Return (o, i) where a loop's next round takes o as the body's input i.

    They are numbers of its outputs and, behind these, of what is left in references.
    """
    if not body.repeats:
        return list(body.feedback)
    left = enumerate(refs_of(body.jaxpr), len(body.jaxpr.outvars))
    return [*body.feedback, *left]


def is_about_refs(eqn: Any) -> bool:
    """Tell an equation that makes a reference, reads it or writes to it."""
    return any(_jax.is_ref(v.aval) for v in (*eqn.invars, *eqn.outvars))


def reads_and_writes(eqn: Any) -> tuple[list[int], list[int]]:
    """Return which operands the results hold, and which its references hold after it.

    Of an equation that is not known, both hold everything.
    """
    everything = list(range(len(eqn.invars)))
    match eqn.primitive.name:
        case "get" | "freeze":
            return [0], [0]
        case "swap":
            reference, value = eqn.invars[:2]
            # `r[...] = x` has no indices, and leaves nothing of what r held.
            whole = len(eqn.invars) == 2 and value.aval.shape == reference.aval.shape
            return [0], [1] if whole else [0, 1]
        case "addupdate":
            return [], [0, 1]
        case _:
            return everything, everything


def carries(aval: Any) -> bool:
    """Tell whether a gradient passes a value, or what a reference holds."""
    inner = getattr(aval, "inner_aval", aval)
    return hasattr(inner, "dtype") and _jax.is_differentiable(inner)


def touched(
    eqn: Any, operands: Sequence[int], carries: Callable[[Any], bool] = carries
) -> tuple[list[int], dict[int, int]]:
    """Bits of the results of such an equation, and of each reference after it.

    They come through values of the types that `carries` says.
    """
    reads, writes = reads_and_writes(eqn)

    def union(which: Sequence[int], aval: Any) -> int:
        bits = 0
        for k in which:
            bits |= operands[k]
        return bits if carries(aval) else 0

    results = [union(reads, v.aval) for v in eqn.outvars]
    numbers = [k for k, v in enumerate(eqn.invars) if _jax.is_ref(v.aval)]
    return results, {k: union(writes, eqn.invars[k].aval) for k in numbers}
