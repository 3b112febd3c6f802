"""Which operands each result of an equation is computed from, asked of `jax.vmap`.

Some equations do the same to several operands at once, and a result is of one of them:
`device_put` and `optimization_barrier` of a tree, `psum` of one. JAX's batching rules
know: where one operand is mapped, a result that is not mapped is not computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.signature import signature

_KEEP = 1024
_known: dict[Any, list[int]] = {}


def operands_by_result(eqn: Any) -> list[int]:
    """Return, for each result, the operands (as bits) that it may be computed from."""
    every = (1 << len(eqn.invars)) - 1
    operands = [k for k, atom in enumerate(eqn.invars) if _is_array(atom)]
    results = [k for k, var in enumerate(eqn.outvars) if _is_array(var)]
    alike = len(eqn.outvars) < 2 or len(operands) < 2 or any(_jax.programs_in(eqn))
    # Nothing is to be told apart, or programs inside may do anything with anything.
    if alike or not results:
        return [every] * len(eqn.outvars)
    key = signature(eqn, literals=False)
    if key not in _known:
        if len(_known) >= _KEEP:
            _known.clear()
        _known[key] = _ask(eqn, operands, results, every)
    return _known[key]


def _is_array(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)  # of float0 and of keys none is known
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    )


def _ask(eqn: Any, operands: list[int], results: list[int], every: int) -> list[int]:
    """Map half of the operands at a time: no two are in the same halves throughout."""
    found = [every] * len(eqn.outvars)
    for bit in range((len(operands) - 1).bit_length()):
        for side in (0, 1):
            mapped = {k for n, k in enumerate(operands) if n >> bit & 1 == side}
            for k in set(results) - _reached(eqn, mapped, results):
                found[k] &= ~sum(1 << i for i in mapped)
    return found


def _reached(eqn: Any, mapped: Collection[int], results: list[int]) -> set[int]:
    """Return which results are mapped where these operands are; all, if nobody knows.

    The axis is the first one, or the last: a rule may want the same number for all
    operands, or not know what to do with the sharding of one that is put before.
    """
    for axis in (0, -1):
        try:
            return _reached_along(axis, eqn, mapped, results)
        except Exception:  # no rule, or it refuses
            continue
    return set(results)


def _reached_along(
    axis: int, eqn: Any, mapped: Collection[int], results: list[int]
) -> set[int]:
    """Map the operands along one axis; return which of the results are mapped then.

    The batching rule of a `custom_vmap` is told which of its operands are mapped, so
    one that hands the results on is asked: no array has to be looked at.
    """
    reached = set[int]()

    @jax.custom_batching.custom_vmap
    def look(out: list[Any]) -> list[Any]:
        return out

    @look.def_vmap
    def see(size: int, are_mapped: Any, out: list[Any]) -> tuple[Any, Any]:
        (flags,) = are_mapped
        reached.update(k for k, flag in zip(results, flags, strict=True) if flag)
        return out, flags

    def one(*operands: Any) -> list[Any]:
        out = _jax.bind(eqn, *operands)
        return look([out[k] for k in results])

    axes = [axis if k in mapped else None for k in range(len(eqn.invars))]
    call: Callable[..., Any] = jax.vmap(one, in_axes=axes)

    def function(operands: Any) -> Any:
        pairs = zip(operands, axes, strict=True)
        return call(*(x if a is None else jnp.stack([x, x], a) for x, a in pairs))

    _jax.traced_at(eqn, function, [atom.aval for atom in eqn.invars])
    return reached
