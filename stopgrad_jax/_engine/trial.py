"""Run a program in which a few equations are given other operands than they were.

So an edit of the user's source can be tried out before it is recommended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .nested import nested
from .rebuild import rebuild

Read = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Masked:
    """An operand gets an ordinary number wherever the condition of a `where` says so.

    Attributes:
      jaxpr: the jaxpr that all of it is in.
      users: the equations that read the masked operand.
      operand, condition: variables of the jaxpr; where the condition holds, the operand
        is `kept`, or else where it does not.
      index: what the condition is indexed with, to have the axes of the operand.
    """

    jaxpr: Any
    users: frozenset[int]
    operand: Any
    condition: Any
    kept: bool
    index: tuple[Any, ...] | None = None

    @functools.cached_property
    def order(self) -> list[int]:
        """The equations, those that the condition needs first."""
        count = len(self.jaxpr.eqns)
        first = _ancestors(self.jaxpr, [self.operand, self.condition])
        return [*sorted(first), *(k for k in range(count) if k not in first)]

    @property
    def is_possible(self) -> bool:
        """Whether the condition is known before the operand is used."""
        return not self.users & _ancestors(self.jaxpr, [self.operand, self.condition])

    def operands(self, index: int, read: Read, number: Any, spread: Any) -> list[Any]:
        """Return the operands of an equation.

        What is put in is the number; with another `spread` than zero, others as well.
        """
        eqn = self.jaxpr.eqns[index]
        if index not in self.users:
            return [read(atom) for atom in eqn.invars]
        x, condition = read(self.operand), read(self.condition)
        condition = condition if self.index is None else condition[self.index]
        places = jnp.arange(x.size).reshape(x.shape)
        wobble = 1.0 + spread * jnp.sin(1.0 + places)
        safe = (number + (number + 0.25) * (wobble - 1.0)).astype(x.dtype)
        masked = jnp.where(condition, *((x, safe) if self.kept else (safe, x)))
        return [masked if atom is self.operand else read(atom) for atom in eqn.invars]


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A literal of some equations of a jaxpr is another number."""

    jaxpr: Any
    users: frozenset[int]
    literal: float

    @property
    def order(self) -> range:
        """The equations as they are."""
        return range(len(self.jaxpr.eqns))

    def operands(self, index: int, read: Read, number: Any, spread: Any) -> list[Any]:
        """Return the operands of an equation."""
        found = []
        for atom in self.jaxpr.eqns[index].invars:
            x = read(atom)
            literal = isinstance(atom, _jax.Literal) and np.ndim(x) == 0
            if index in self.users and literal and x == self.literal:
                x = jnp.asarray(number * (1.0 - spread), jnp.result_type(x))
            found.append(x)
        return found


Change = Masked | Replaced


def evaluate(
    change: Change, number: Any, spread: Any, jaxpr: Any, consts: Any, operands: Any
) -> list[Any]:
    """Run a program with a change somewhere in it."""
    variables, values = [*jaxpr.constvars, *jaxpr.invars], [*consts, *operands]
    env = dict(zip(variables, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    here = jaxpr is change.jaxpr
    for index in change.order if here else range(len(jaxpr.eqns)):
        eqn = jaxpr.eqns[index]
        if here:
            values = change.operands(index, read, number, spread)
        else:
            values = [read(atom) for atom in eqn.invars]
        if holds(eqn, change.jaxpr):
            results = _around(change, number, spread, eqn, values)
        else:
            results = _jax.bind(eqn, *values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _around(
    change: Change, number: Any, spread: Any, eqn: Any, operands: Sequence[Any]
) -> list[Any]:
    inner = nested(eqn)
    bodies = inner.bodies if inner else ()

    def call(k: int, operands: Any, *_: Any) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = bodies[k].jaxpr, bodies[k].consts
        return evaluate(change, number, spread, jaxpr, consts, operands), []

    return list(rebuild(eqn, call, [[] for _ in bodies], operands, [], None)[0])


def holds(eqn: Any, jaxpr: Any) -> bool:
    """Tell whether a jaxpr is somewhere inside an equation that can be made anew."""
    inner = nested(eqn)
    if inner is None or inner.rule:
        return False
    return any(
        body.jaxpr is jaxpr or any(holds(e, jaxpr) for e in body.jaxpr.eqns)
        for body in inner.bodies
    )


def _ancestors(jaxpr: Any, atoms: Sequence[Any]) -> set[int]:
    """Return the equations that values are computed by."""
    wanted = {atom for atom in atoms if not isinstance(atom, _jax.Literal)}
    found = set[int]()
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        if any(v in wanted for v in eqn.outvars):
            found.add(index)
            wanted.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    return found
