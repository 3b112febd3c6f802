"""How much the rounding of all that a function computes may change its result.

Each value that is differentiated through may be off by its last digit, and its
cotangent tells how much that matters. A value far from zero has a coarse last digit, so
the difference of what was made of two of them is mostly rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .copies import Copies, Copy, Tokens, around
from .declared import (
    EVERY,
    Declared,
    constant,
    is_float,
    last_digit,
    times,
    where_moved,
)
from .gate import gate
from .handed import is_handed
from .nested import nested
from .rules import SCALE
from .tap import tap, weighed

# What moves values and computes none. Left out for speed: they would only count twice.
_EXACT = (
    *("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "expand_dims"),
    *("dynamic_update_slice", "gather", "name", "neg", "pad", "reshape", "rev"),
    *("select_n", "slice", "split", "squeeze", "stop_gradient", "transpose"),
)
# What adds up: it rounds as the terms do, which may cancel.
_SUMS = ("conv_general_dilated", "cumsum", "dot_general", "reduce_sum")


class Rounding(Declared):
    """Evaluates a program, and all that is in it, with the rounding of each value.

    The token `EVERY` is for all of it, that of a rule for what is in its function. Of
    two copies, (base, moved), the second one tells which entries move at all.
    """

    def equation(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Return an equation's results, which the tokens move by their rounding."""
        name, inner, (operands, others) = eqn.primitive.name, nested(eqn), copies
        if is_handed(eqn):
            return [_passed_by(operands), list(others)]
        if _jax.gate_name(eqn) == "with_backward":
            count = eqn.params["split"][0]
            values = operands[:count]
            out = _jax.bind(eqn, *constant(values), *operands[count:])
            return [list(map(tap, out, values)), list(others[:count])]
        known = self.reading.forward or name != "while"
        if inner is not None and known and not inner.rule:
            return around(self.run, eqn, copies, tokens)
        out, there = self._both(eqn, copies)
        if name in _EXACT:
            return [out, there]
        terms = self._terms(eqn, operands, out)
        pairs = zip(constant(out), there, map(_last_digit, terms), strict=True)
        sizes = [
            where_moved(x != y, size) if is_float(x) else None for x, y, size in pairs
        ]
        by = times if self.reading.forward else weighed
        token = tokens[EVERY] + tokens.get(id(eqn), jnp.zeros_like(tokens[EVERY]))
        shifts = [None if size is None else by(token, size) for size in sizes]
        if inner is not None and inner.rule:
            (body,), start = inner.bodies, [_passed_by(operands), others]
            inside, _ = self.run(body.jaxpr, body.consts, start, {EVERY: token})
            shifts = [x if x is None else x + y for x, y in zip(shifts, inside, strict=True)]
        taps = zip(out, shifts, strict=True)
        return [[x if shift is None else tap(x, shift) for x, shift in taps], there]

    def _both(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Evaluate an equation, its gates that are not linear left out."""
        one = (super(Rounding, self).equation(eqn, [c], {})[0] for c in copies)
        return list(one)

    def _terms(self, eqn: Any, operands: Copy, out: Sequence[Any]) -> Sequence[Any]:
        if eqn.primitive.name in _SUMS and all(map(is_float, operands)):
            return _jax.bind(eqn, *(jnp.abs(x) for x in constant(operands)))
        return constant(out)


def _passed_by(values: Copy) -> list[Any]:
    """Return values that JAX differentiates through, although nothing comes of it."""
    nothing = jnp.zeros(())
    return [
        gate([x], [x], [nothing], SCALE)[0] if is_float(x) else x for x in values
    ]


def _last_digit(x: Any) -> Any:
    return last_digit(x) if is_float(x) else x
