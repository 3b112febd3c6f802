"""Where a function raises while it is run: a callback, an `error_if`, a solver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from stopgrad_jax._source.labels import Spot

from .levels import Failed
from .stepper import Stepper


def raised(
    stepper: Stepper, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]
) -> tuple[Spot | None, Exception] | None:
    """Run a program step by step up to the operation that raises.

    Returns the user's expression and the error as it was raised there; None if nothing
    raises, step by step.
    """
    try:
        stepper.top(jaxpr, consts, operands, careful=True)
        jax.effects_barrier()
        return None
    except Failed as failed:
        inner = failed
    while True:
        level, op = inner.level, inner.op
        try:
            stepper.inside(level, op, level.read(op))
        except Failed as failed:
            inner = failed
        else:
            break
    return (op.path.spots[-1] if op.path.spots else None), inner.error
