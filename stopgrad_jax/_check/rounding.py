"""How much the rounding of all that a function computes may change its result.

Each value that is differentiated through may be off by its last digit, and its
cotangent tells how much that matters. A value far from zero has a coarse last digit, so
the difference of what was made of two of them is mostly rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._gate.primitive import gate
from stopgrad_jax._gate.rules import SCALE
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.own_stop import is_handed

from .copies import Copies, Copy, Tokens, around
from .followed import constants, is_float
from .moved_copies import EVERY, INSIDE, Opened, times
from .tap import last_digit, tap, weighed, where_moved

# What moves values and computes none. Left out for speed: they would only count twice.
_EXACT = (
    *("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "expand_dims"),
    *("dynamic_update_slice", "gather", "name", "neg", "pad", "reshape", "rev"),
    *("select_n", "slice", "split", "squeeze", "stop_gradient", "transpose"),
)
# What adds up: it rounds as the terms do, which may cancel.
_SUMS = ("conv_general_dilated", "cumsum", "dot_general", "reduce_sum")
# What solves equations: its result is that of operands that are off by their rounding,
# which near a singular matrix is far more than that of the result.
_SOLVERS = (
    *("cholesky", "custom_linear_solve", "eig", "eigh", "householder_product", "lu"),
    *("qr", "svd", "triangular_solve", "tridiagonal_solve"),
)


class Rounding(Opened):
    """Evaluates a program, and all that is in it, with the rounding of each value.

    The token `EVERY` is for all of it, that of a rule for what is in its function, and
    `INSIDE` for what is in the functions of `with_backward`. Of two copies, (base,
    moved), the second one tells which entries move at all.
    """

    _around = False  # whether all that is evaluated is in such a function

    def equation(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Return an equation's results, which the tokens move by their rounding."""
        inner, (operands, others) = control(eqn), copies
        if is_handed(eqn):
            return [self._note(_passed_by(operands)), list(others)]
        if _jax.gate_name(eqn) == "with_backward":
            count = eqn.params["split"][0]
            values = operands[:count]
            out = _jax.bind(eqn, *constants(values), *operands[count:])
            return [list(map(tap, out, values)), list(others[:count])]
        inside = self._around or any(id(x) in self._inside for x in operands)
        known = inner is not None and (self.reading.forward or not inner.dynamic)
        if inner is not None and known and not inner.rule:
            outer, self._around = self._around, inside
            out, there = around(self.run, inner, copies, tokens)
            self._around = outer
        else:
            out, there = self._rounded(eqn, copies, tokens, inside)
        return [self._note(out) if inside else out, there]

    def _rounded(
        self, eqn: Any, copies: Copies, tokens: Tokens, inside: bool
    ) -> list[list[Any]]:
        """Return an equation's results, each moved by the token as it is rounded."""
        (operands, others), inner = copies, control(eqn)
        by = times if self.reading.forward else weighed
        keys = [EVERY, id(eqn), *([INSIDE] if inside else ())]
        token = sum((tokens[k] for k in keys[1:] if k in tokens), tokens[EVERY])
        if _jax.kind_of(eqn) in _SOLVERS:
            operands = [
                tap(x, by(token, last_digit(constants([x])[0]))) if is_float(x) else x
                for x in operands
            ]
        out, there = self._both(eqn, [operands, others])
        if _jax.kind_of(eqn) in _EXACT:
            return [out, there]
        terms = self._terms(eqn, operands, out)
        triples = zip(constants(out), there, map(_last_digit, terms), strict=True)
        sizes = [
            where_moved(x != y, size) if is_float(x) else None for x, y, size in triples
        ]
        shifts = [None if size is None else by(token, size) for size in sizes]
        if inner is not None and inner.rule:
            # The rule is what is differentiated, and its function is what rounds.
            (body,), start = inner.bodies, [_passed_by(operands), others]
            within, _ = self.run(body.jaxpr, body.consts, start, {EVERY: token})
            pairs = zip(shifts, within, strict=True)
            shifts = [x if x is None else x + y for x, y in pairs]
        taps = zip(out, shifts, strict=True)
        return [[x if shift is None else tap(x, shift) for x, shift in taps], there]

    @functools.cached_property
    def _opened(self) -> Opened:
        """The same without rounding: what is inside has one copy as well."""
        return Opened(self.sites, self.reading)

    @functools.cached_property
    def _inside(self) -> dict[int, Any]:
        """Values in functions of `with_backward`; kept, for their ids to be theirs."""
        return {}

    def _note(self, values: list[Any]) -> list[Any]:
        self._inside.update((id(x), x) for x in values)
        return values

    def _both(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Evaluate an equation, its gates that are not linear left out."""
        return [self._opened.equation(eqn, [c], {})[0] for c in copies]

    def _terms(self, eqn: Any, operands: Copy, out: Sequence[Any]) -> Sequence[Any]:
        if _jax.kind_of(eqn) in _SUMS and all(map(is_float, operands)):
            return _jax.bind(eqn, *(jnp.abs(x) for x in constants(operands)))
        return constants(out)


def _passed_by(values: Copy) -> list[Any]:
    """Return values that JAX differentiates through, although nothing comes of it."""
    nothing = jnp.zeros(())
    return [gate([x], [x], [nothing], SCALE)[0] if is_float(x) else x for x in values]


def _last_digit(x: Any) -> Any:
    return last_digit(x) if is_float(x) else x
