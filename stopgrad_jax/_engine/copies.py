"""Loops, branches and shards around a body that is run on several copies at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax

from .nested import nested, while_loop

Copy = Sequence[Any]  # operands
Copies = Sequence[Copy]  # the base first
# Scalars that the derivative is taken by as well, for what is asked at an equation.
Tokens = dict[Any, jax.Array]
# (jaxpr, its constants, operands of each copy, tokens) -> results of each copy
Run = Callable[[Any, Sequence[Any], Copies, Tokens], list[list[Any]]]


def around(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    """Evaluate an equation that holds jaxprs, with `run` for these."""
    return _AROUND.get(_jax.kind_of(eqn), _inline)(run, eqn, copies, tokens)


def _inline(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    inner = nested(eqn)
    assert inner is not None
    (body,) = inner.bodies
    return run(body.jaxpr, body.consts, copies, tokens)


def _scan(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    num_consts, num_carry = _jax.scan_arity(eqn)
    jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
    first = num_consts + num_carry
    heads = [c[:num_consts] for c in copies]

    def step(carries: Any, xs: Any) -> Any:
        parts = zip(heads, carries, _unpacked(xs, shared), strict=True)
        outs = run(jaxpr, consts, [[*h, *c, *x] for h, c, x in parts], tokens)
        pairs = zip(outs, carries, strict=True)
        carry = [_typed(out[:num_carry], c) for out, c in pairs]
        return carry, [out[num_carry:] for out in outs]

    params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    init = [[jnp.asarray(x) for x in c[num_consts:first]] for c in copies]
    xs, shared = _packed([c[first:] for c in copies])
    carries, ys = jax.lax.scan(step, init, xs, **params)
    return [[*c, *y] for c, y in zip(carries, ys, strict=True)]


def _while(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = (_jax.opened(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
    heads = [c[n : n + m] for c in copies]

    def goes_on(carries: Any) -> Any:
        return _jax.evaluate(*cond, [*copies[0][:n], *carries[0]])[0]

    def step(carries: Any) -> Any:
        every = [[*h, *c] for h, c in zip(heads, carries, strict=True)]
        outs = run(*body, every, tokens)
        return list(map(_typed, outs, carries))

    init = [[jnp.asarray(x) for x in c[n + m :]] for c in copies]
    return while_loop(eqn, goes_on, step, init)


def _cond(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    inner = nested(eqn)
    operands, shared = _packed([c[1:] for c in copies])

    def branch(body: Any) -> Callable[[Any], Any]:
        def chosen(operands: Any) -> Any:
            every = _unpacked(operands, shared)
            outs = run(body.jaxpr, body.consts, every, tokens)
            return [[jnp.asarray(x) for x in out] for out in outs]

        return chosen

    branches = [branch(body) for body in (inner.bodies if inner else ())]
    return jax.lax.switch(copies[0][0], branches, operands)


def _shard_map(run: Run, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
    jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
    specs, count = list(eqn.params["in_specs"]), len(copies)
    operands, shared = _packed(copies)
    moved = [[specs[k] for k, same in enumerate(keep) if not same] for keep in shared]

    def body(operands: Any, tokens: Any) -> Any:
        return run(jaxpr, consts, _unpacked(operands, shared), tokens)

    return jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=([specs, *moved], PartitionSpec()),
        out_specs=[list(eqn.params["out_specs"])] * count,
        check_vma=eqn.params["check_vma"],
        axis_names=eqn.params["newly_manual_axes"],
    )(operands, tokens)


_AROUND: dict[str, Callable[..., list[list[Any]]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}


# What is the same in a copy as in the base is handed on once, and stays the same.


def _packed(copies: Copies) -> tuple[list[list[Any]], list[list[bool]]]:
    base = [jnp.asarray(x) for x in copies[0]]
    shared = [[x is y for x, y in zip(c, copies[0], strict=True)] for c in copies[1:]]
    rest = [
        [jnp.asarray(x) for x, same in zip(c, keep, strict=True) if not same]
        for c, keep in zip(copies[1:], shared, strict=True)
    ]
    return [base, *rest], shared


def _unpacked(packed: Any, shared: Sequence[Sequence[bool]]) -> list[list[Any]]:
    base, *rest = packed
    copies = [list(base)]
    for values, keep in zip(rest, shared, strict=True):
        moved = iter(values)
        copies.append(
            [x if same else next(moved) for x, same in zip(base, keep, strict=True)]
        )
    return copies


def _typed(new: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(x, old.dtype) for x, old in zip(new, like, strict=True)]
