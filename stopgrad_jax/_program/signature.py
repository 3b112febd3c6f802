"""When two equations, or two runs of equations, compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax


def signature(eqn: Any, literals: bool = True) -> Any:
    """Return a hashable key: equal keys mean equal results *and* derivatives.

    An equation that cannot be compared gets a key of its own. Without `literals`,
    equations that differ only in a literal's value are the same.
    """
    # Two effects are not one, however alike: each has to happen.
    if eqn.effects:
        return object()
    operands = tuple(
        (_literal(v) if literals else (v.aval,))
        if isinstance(v, _jax.Literal)
        else v.aval
        for v in eqn.invars
    )
    key = (eqn.primitive, operands, eqn.ctx, _params(eqn))
    # A parameter may be an array, or another object that has no hash.
    try:
        hash(key)
    except TypeError:
        return object()
    return key


def fingerprint(
    eqns: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    signature: Callable[[Any], Any] = signature,
) -> Any:
    """Return a key for a run of equations that does not depend on variable names."""
    number = {var: k for k, var in enumerate(inputs)}

    def place(atom: Any) -> Any:
        if isinstance(atom, _jax.Literal):
            return None  # its value is part of the signature
        return number.setdefault(atom, len(number))

    body = tuple(
        (signature(e), *map(place, e.invars), *map(place, e.outvars)) for e in eqns
    )
    return (body, tuple(map(place, outputs)))


def _params(eqn: Any) -> Any:
    if _jax.kind_of(eqn) not in _jax.CUSTOM:
        return tuple(eqn.params.items())
    # Each call of a custom rule holds new objects: compare what they do instead.
    rule = _jax.custom_rule(eqn)
    jaxpr, consts = _jax.opened(_jax.params_of(eqn)["call_jaxpr"])
    same = fingerprint(jaxpr.eqns, jaxpr.invars, jaxpr.outvars)
    return (rule or object(), tuple(map(id, consts)), same)


def _literal(literal: Any) -> Any:
    value = literal.val
    # As bytes: nan is nan here, and 0. is not -0.
    return (literal.aval, getattr(value, "tobytes", lambda: (type(value), value))())
