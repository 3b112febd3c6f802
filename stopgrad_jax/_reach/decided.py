"""Which case of a selection a constant of the program decides on, however handed in.

`jax.lax.select(True, x, y)` has the constant at the selection itself. `jnp.where(True,
x, y)` hands it to a jitted function. Here a program is written so that its selections
have it themselves, as `jnp.var` with the literal 0 in its comparison. Only single real
numbers are followed, and only into what runs once where it is called: what a loop
carries is another value in the next round.
A branch of a `cond` that a constant rules out still counts, as in TensorFlow: its
values get zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.anew import reading, with_eqns
from stopgrad_jax._program.control import Control, control


class Decided:
    """Writes programs with what constants decide; it keeps those that it wrote."""

    def __init__(self) -> None:
        self._written: dict[Any, tuple[Any, Any]] = {}

    def program(self, jaxpr: Any, given: Mapping[Any, Any] | None = None) -> Any:
        """Return a jaxpr of the same variables; `given` are literals for its inputs."""
        given = given or {}
        numbers = {v: np.asarray(x.val).item() for v, x in given.items()}
        # By the numbers, as each call has literals of its own.
        key = (id(jaxpr), *map(numbers.get, jaxpr.invars if numbers else ()))
        if key not in self._written:  # with the jaxpr: its id must stay its own
            self._written[key] = jaxpr, _written(jaxpr, given)
        return self._written[key][1]

    def control(self, eqn: Any) -> Control | None:
        """Describe an equation's inner jaxprs, with what its literals decide."""
        inner = control(eqn)
        if inner is None or not _is_call(inner):
            return inner
        (body,) = inner.bodies
        given = {
            var: eqn.invars[k]
            for var, k in zip(body.jaxpr.invars, body.operands, strict=True)
            if _is_constant(eqn.invars[k])
        }
        if not given:
            return inner
        body = dataclasses.replace(body, jaxpr=self.program(body.jaxpr, given))
        return inner.with_bodies([body])


def _is_call(inner: Control | None) -> bool:
    return inner is not None and inner.is_call and not inner.rule


def _is_constant(atom: Any) -> bool:
    """Tell a literal that is one boolean, integer or real number."""
    if not isinstance(atom, _jax.Literal) or np.ndim(atom.val):
        return False
    return np.asarray(atom.val).dtype.kind in "biuf"


def _written(jaxpr: Any, given: Mapping[Any, Any]) -> Any:
    """Return a jaxpr whose selections, and calls, read the constants themselves.

    Only these are changed: any other equation does the same with the variable, and the
    jaxpr stays the object that others know where there is none.
    """
    known, eqns = dict(given), []
    for eqn in jaxpr.eqns:
        new = eqn
        if eqn.primitive.name == "select_n":
            which = eqn.invars[0]
            if not isinstance(which, _jax.Literal) and which in known:
                new = eqn.replace(invars=[known[which], *eqn.invars[1:]])
        elif _is_call(control(eqn)):
            new = reading(eqn, known)
        elif (literal := _folded(reading(eqn, known))) is not None:
            known[eqn.outvars[0]] = literal
        eqns.append(new)
    if all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True)):
        return jaxpr
    return with_eqns(jaxpr, eqns, jaxpr.outvars)


def _folded(eqn: Any) -> Any:
    """Return the one number that fills an equation's result, or None."""
    fold = _FOLDS.get(eqn.primitive.name)
    if fold is None or not all(map(_is_constant, eqn.invars)):
        return None
    dtype = eqn.outvars[0].aval.dtype
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
        return None
    with np.errstate(all="ignore"):  # as in JAX
        value = np.asarray(fold(*(np.asarray(atom.val) for atom in eqn.invars)))
        value = value.astype(dtype)
    return _jax.Literal(value, jax.typeof(value))


# What lies between a constant and what it decides, in `jnp.where` and `jnp.var`.
_FOLDS: Mapping[str, Callable[..., Any]] = {
    "broadcast_in_dim": lambda x: x,
    "convert_element_type": lambda x: x,
    "sub": np.subtract,
    **{"eq": np.equal, "ne": np.not_equal},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    "not": np.invert,
}
