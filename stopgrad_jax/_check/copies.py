"""Loops, branches and shards around a body that is run on several copies at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import Control
from stopgrad_jax._program.wiring import Extras

Copy = Sequence[Any]  # operands
Copies = Sequence[Copy]  # the base first
# Scalars that the derivative is taken by as well, for what is asked at an equation.
Tokens = dict[Any, jax.Array]
# (jaxpr, its constants, operands of each copy, tokens) -> results of each copy
RunCopies = Callable[[Any, Sequence[Any], Copies, Tokens], list[list[Any]]]


@jax.tree_util.register_pytree_node_class
class _Value:
    """A value in each copy: what is the same as the base is handed on once.

    So it is still the same one inside of a loop, a branch or a `shard_map`.
    """

    def __init__(self, copies: Sequence[Any]) -> None:
        self.copies = list(copies)

    def tree_flatten(self) -> tuple[list[Any], tuple[bool, ...]]:
        base, *others = self.copies
        same = tuple(x is base for x in others)
        return [base, *(x for x in others if x is not base)], same

    @classmethod
    def tree_unflatten(cls, same: tuple[bool, ...], children: Sequence[Any]) -> _Value:
        base, *rest = children
        moved = iter(rest)
        return cls([base, *(base if is_base else next(moved) for is_base in same)])


def _each(value: Any) -> list[Any]:
    return value.copies if isinstance(value, _Value) else value


def _in_each(copies: Sequence[Any]) -> list[Any]:
    base = jnp.asarray(copies[0])
    return [base, *(base if x is copies[0] else jnp.asarray(x) for x in copies[1:])]


def around(
    run: RunCopies, inner: Control, copies: Copies, tokens: Tokens
) -> list[list[Any]]:
    """Evaluate an equation that holds programs, with `run` for these."""
    bodies = inner.bodies
    if inner.is_call:
        return run(bodies[0].jaxpr, bodies[0].consts, copies, tokens)

    def call(k: int, operands: Any, _: Any, tokens: Tokens) -> Any:
        body = bodies[k]
        values = list(map(_each, operands))
        if body.is_condition:  # the base decides
            base = [v[0] for v in values]
            return [_jax.evaluate(body.jaxpr, body.consts, base)], []
        every = list(zip(*values, strict=True)) or [()] * len(copies)
        outs = run(body.jaxpr, body.consts, every, tokens)
        results = [list(map(jnp.asarray, each)) for each in zip(*outs, strict=True)]
        for out, back in body.feedback:
            kinds = [x.dtype for x in values[back]]
            # JAX refuses a loop whose carry comes back in another dtype, as that of a
            # moved copy may.
            results[out] = list(map(jnp.asarray, results[out], kinds))
        return results, []

    values = list(map(_in_each, zip(*copies, strict=True)))
    # What a loop carries may come to differ.
    carried = {b.operands[k] for b in bodies for _, k in b.feedback}
    given = [x if k in carried else _Value(x) for k, x in enumerate(values)]
    extras = Extras(shared=tokens, lead=lambda value: _each(value)[0])
    out, _ = inner.run(call, given, extras)
    return [[value[k] for value in out] for k in range(len(copies))]
