"""What rules return where a program is differentiated, beside what functions return.

JAX takes the value of a rule there, and that of its function everywhere else: whoever
writes a rule promises that they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .copies import Copies, Tokens
from .followed import constants
from .measured import ByLeaf, Weighed, derive
from .moved_copies import Opened, times
from .sought import Reading
from .tap import handed_on, tap

# What the entries of a token stand for: sums, weighed by what comes back.
_OWN, _TOLD, _COUNT = range(3)


def other_values(
    program: Weighed, rules: Sequence[int], forward: bool
) -> dict[int, tuple[float, float]]:
    """Find the rules that return another value than their function.

    Of each the two, where they are farthest apart in an entry that has a derivative:
    first that of the function. Of one in a loop they are some mean, and they are nan if
    the derivative is.
    """
    beside = _Beside(program.sites, Reading(asked=frozenset(rules), forward=forward))

    @jax.jit
    def rows(values: ByLeaf) -> Any:
        def function(values: ByLeaf, tokens: Tokens) -> Any:
            copies = [program.filled(values)]
            (out,) = beside.run(program.jaxpr, program.consts, copies, tokens)
            return program.kept(out), ()

        tokens = {key: jnp.zeros(3) for key in rules}
        return derive(forward)(function, values, tokens, program.weights)[2]

    found = {k: np.asarray(x, np.float64) for k, x in rows(program.values()).items()}
    with np.errstate(invalid="ignore"):
        return {
            key: (float(row[_OWN] / row[_COUNT]), float(row[_TOLD] / row[_COUNT]))
            for key, row in found.items()
            if row[_COUNT]
        }


class _Beside(Opened):
    """Evaluates a program; a rule's token is for the entry that is farthest off."""

    def is_special(self, eqn: Any) -> bool:
        return id(eqn) in self.reading.asked or super().is_special(eqn)

    def rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        (out,) = super().rule(eqn, copies, tokens)
        if id(eqn) not in tokens:
            return [out]
        by = times if self.reading.forward else handed_on
        own = _jax.bind(eqn, *constants(copies[0]))
        token, far = tokens[id(eqn)], _farthest(out, own)
        return [
            [
                x if where is None else tap(x, _row(by, token, where, x, y))
                for x, y, where in zip(out, own, far, strict=True)
            ]
        ]


def _row(by: Any, token: jax.Array, where: Any, x: Any, own: Any) -> Any:
    zero, one = jnp.zeros_like(own), jnp.ones_like(own)
    parts = {_OWN: own, _TOLD: jax.lax.stop_gradient(x), _COUNT: one}
    terms = [by(token[k], jnp.where(where, y, zero)) for k, y in parts.items()]
    return terms[0] + terms[1] + terms[2]


def _farthest(out: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    """Mark one entry of all results, if there is one that differs."""
    gaps = [_gap(x, y) for x, y in zip(constants(out), own, strict=True)]
    most = jnp.asarray(0.0)
    for gap in gaps:
        if gap is not None:
            most = jnp.maximum(most, jnp.max(gap, initial=0.0))
    # One entry of all results, or the token would stand for a sum of several; none
    # where nothing differs.
    taken, marks = most == 0, list[Any]()
    for gap in gaps:
        if gap is None or not gap.size:
            marks.append(None)
            continue
        flat = jnp.ravel(gap)
        first = jnp.arange(flat.size) == jnp.argmax(flat)
        marks.append(jnp.reshape(first & (flat == most) & ~taken, gap.shape))
        taken |= jnp.any(flat == most)
    return marks


def _gap(x: Any, own: Any) -> Any:
    """Return how far a result is off; None of what is no real number."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return None
    same = (x == own) | (jnp.isnan(x) & jnp.isnan(own))
    gap = jnp.where(same, 0, jnp.abs(x - own)).astype(jnp.result_type(float))
    return jnp.where(jnp.isnan(gap), jnp.inf, gap)
