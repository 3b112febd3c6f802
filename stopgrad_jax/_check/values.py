"""Rules that return another value than their function, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control

from .compare import Compared
from .own_values import other_values

Both = tuple[float, float]  # by the function, and by the rule


def at_own_values(compared: Compared) -> Compared:
    """Return the same with the values of functions wherever rules are compared."""
    reading, sites = compared.reading, compared.program.sites
    asked = reading.asked - reading.followed
    rules = {key for key in asked if _jax.kind_of(sites[key].eqn) in _jax.CUSTOM}
    return compared if rules <= reading.valued else compared.reread(valued=rules)


def whose_value(
    other: Compared, settles: Callable[[frozenset[int]], bool], least: float
) -> tuple[int, Both] | None:
    """Find the rule whose value is why something is wrong.

    Args:
      other: where all of them have the values of their functions.
      settles: tells whether nothing is wrong if some of them have.
      least: the smallest difference that counts, of the size of the value.
    """
    rules = sorted(other.reading.valued)
    found: Mapping[int, Both] = other_values(
        other.program, rules, other.reading.forward
    )
    far = {key: _apart(*both) for key, both in found.items()}
    order = sorted((k for k in far if far[k] > least), key=lambda k: -far[k])
    if not least:  # what comes back to the rest is zero, there
        order += [key for key in rules if key not in far]
    if not order or not settles(other.reading.valued):
        return None
    alone = (key for key in order if len(order) == 1 or settles(frozenset({key})))
    # Where it takes several of them, the one that is farthest off is named.
    key = next(alone, order[0])
    return key, found.get(key, (np.nan, np.nan))


def _apart(own: float, told: float) -> float:
    if not np.isfinite(own) or not np.isfinite(told):
        return np.inf
    return abs(own - told) / max(abs(own), abs(told), np.finfo(float).tiny)


def is_repeated(compared: Compared, key: int) -> bool:
    """Tell whether a rule is called again and again, in a loop or on many devices."""

    def search(jaxpr: object, again: bool) -> bool:
        for eqn in _jax.opened(jaxpr)[0].eqns:
            if id(eqn) == key:
                return again
            inner = control(eqn)
            looped = again or bool(inner and (inner.loops or inner.on_devices))
            if any(search(inner, looped) for inner in _jax.programs_in(eqn)):
                return True
        return False

    return search(compared.program.jaxpr, False)
