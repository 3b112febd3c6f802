"""Run a program in which a few equations are given other operands than they were.

So an edit of the user's source can be tried out before it is recommended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control

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

    @property
    def needs(self) -> tuple[Any, ...]:
        """What its users read besides their operands."""
        return self.operand, self.condition

    @property
    def is_possible(self) -> bool:
        """Whether the condition is known before the operand is used."""
        return not self.users & _ancestors(self.jaxpr, self.needs)

    def changed(
        self, eqn: Any, values: list[Any], read: Read, number: Any, spread: Any
    ) -> list[Any]:
        """Return other operands of one of its users.

        What is put in is the number; with another `spread` than zero, others as well.
        """
        x, condition = read(self.operand), read(self.condition)
        condition = condition if self.index is None else condition[self.index]
        places = jnp.arange(x.size).reshape(x.shape)
        wobble = 1.0 + spread * jnp.sin(1.0 + places)
        safe = (number + (number + 0.25) * (wobble - 1.0)).astype(x.dtype)
        masked = jnp.where(condition, *((x, safe) if self.kept else (safe, x)))
        pairs = zip(eqn.invars, values, strict=True)
        return [masked if atom is self.operand else value for atom, value in pairs]


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A literal of some equations of a jaxpr is another number."""

    jaxpr: Any
    users: frozenset[int]
    literal: float
    needs: tuple[Any, ...] = ()

    def changed(
        self, eqn: Any, values: list[Any], read: Read, number: Any, spread: Any
    ) -> list[Any]:
        """Return other operands of one of its users."""
        found = []
        for atom, x in zip(eqn.invars, values, strict=True):
            literal = isinstance(atom, _jax.Literal) and np.ndim(x) == 0
            new = literal and x == self.literal
            other = number * (1.0 - spread)
            found.append(jnp.asarray(other, jnp.result_type(x)) if new else x)
        return found


@dataclasses.dataclass(frozen=True)
class Guarded:
    """An operand gets an ordinary number where a test of its own says so."""

    jaxpr: Any
    users: frozenset[int]
    operand: Any
    is_fine: Callable[[Any], Any]
    needs: tuple[Any, ...] = ()

    def changed(
        self, eqn: Any, values: list[Any], read: Read, number: Any, spread: Any
    ) -> list[Any]:
        """Return other operands of one of its users."""
        x = read(self.operand)
        safe = jnp.where(self.is_fine(x), x, jnp.asarray(number, x.dtype))
        pairs = zip(eqn.invars, values, strict=True)
        return [safe if atom is self.operand else value for atom, value in pairs]


Change = Masked | Replaced | Guarded


def run_changed(
    changes: Sequence[Change],
    number: Any,
    spread: Any,
    jaxpr: Any,
    consts: Any,
    operands: Any,
) -> list[Any]:
    """Run a program with changes somewhere in it."""
    variables, values = [*jaxpr.constvars, *jaxpr.invars], [*consts, *operands]
    env = dict(zip(variables, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    here = [change for change in changes if change.jaxpr is jaxpr]
    for index in _order(jaxpr, here):
        eqn = jaxpr.eqns[index]
        values = [read(atom) for atom in eqn.invars]
        for change in here:
            if index in change.users:
                values = change.changed(eqn, values, read, number, spread)
        if any(holds(eqn, change.jaxpr) for change in changes):
            results = _around(changes, number, spread, eqn, values)
        else:
            results = _jax.bind(eqn, *values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _around(
    changes: Sequence[Change],
    number: Any,
    spread: Any,
    eqn: Any,
    operands: Sequence[Any],
) -> list[Any]:
    """Make an equation anew, with the changes in the programs that it holds."""
    inner = control(eqn)
    assert inner is not None
    bodies = inner.bodies

    def call(k: int, operands: Any, *_: Any) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = bodies[k].jaxpr, bodies[k].consts
        return run_changed(changes, number, spread, jaxpr, consts, operands), []

    return list(inner.run(call, operands)[0])


def _order(jaxpr: Any, changes: Sequence[Change]) -> list[int]:
    """Order the equations, those first that a change needs before its users.

    Raises ValueError where what it needs is computed from its users.
    """
    count = len(jaxpr.eqns)
    if not any(change.needs for change in changes):
        return list(range(count))
    makers = {v: k for k, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    reads = [list(eqn.invars) for eqn in jaxpr.eqns]
    for change in changes:
        for index in change.users:
            reads[index] += change.needs
    order, done, open_, stack = list[int](), set[int](), set[int](), [*range(count)]
    stack.reverse()
    while stack:
        index = stack[-1]
        if index in done:
            stack.pop()
            continue
        atoms = (a for a in reads[index] if not isinstance(a, _jax.Literal))
        missing = [k for k in (makers.get(a) for a in atoms) if k is not None]
        missing = [k for k in missing if k not in done]
        if not missing:
            order.append(stack.pop())
            done.add(index)
        elif index in open_:
            raise ValueError("it is computed from what it changes")
        else:
            open_.add(index)
            stack += missing
    return order


def holds(eqn: Any, jaxpr: Any) -> bool:
    """Tell whether a jaxpr is somewhere inside an equation that can be made anew."""
    inner = control(eqn)
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
