"""How equations are run: by their own lines, in their scopes, as JAX would run them.

Part of `_jax`, the only door to JAX that is version-dependent or not public.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jax.extend.core.primitives import convert_element_type_p, mul_p

from .places import are_inlined


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Run a jaxpr's equations with their own source lines and name stacks."""
    if called := as_called(jaxpr.eqns):
        eqns = [called.get(id(eqn), eqn) for eqn in jaxpr.eqns]
        jaxpr = jaxpr.replace(eqns=eqns)
    return jax.core.eval_jaxpr(jaxpr, consts, *args)


def bind(eqn: Any, *operands: Any) -> list[Any]:
    """Run one equation on other operands, with its own source line and scope."""
    with at_source_of(eqn):
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def at_source_of(eqn: Any) -> Iterator[None]:
    """Trace what follows at this equation's source line and in its scope."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
        yield


@contextlib.contextmanager
def at_line_of(eqn: Any) -> Iterator[None]:
    """Trace what follows at this equation's source line."""
    with source_info_util.user_context(eqn.source_info.traceback):
        yield


@contextlib.contextmanager
def in_an_edit(eqn: Any) -> Iterator[None]:
    """Trace at this equation's line what is put in the place of its value."""
    with at_line_of(eqn), source_info_util.transform_name_stack("edit"):
        yield


# As without jit -----------------------------------------------------------------------


def is_tracing() -> bool:
    """Tell whether results are being staged into a program, not computed now.

    Without the function nothing is shared between runs, and the products of `as_called`
    are nested calls.
    """
    return getattr(core, "unsafe_am_i_under_a_jit_DO_NOT_USE", lambda: False)()


def as_called(eqns: Sequence[Any]) -> dict[int, Any]:
    """Return what to run in the place of some equations, by their id, without `jit`.

    There JAX runs `jnp.multiply` as a whole, although its operations are in a program
    one by one. So XLA sees that an array is multiplied by booleans, and selects: zero
    is the product with an infinity, too.
    """
    if is_tracing():
        return {}
    casts, found = dict[Any, Any](), dict[int, Any]()
    for eqn in eqns:
        read = [v for v in eqn.invars if not isinstance(v, core.Literal) and v in casts]
        if eqn.primitive is convert_element_type_p and _is_boolean(eqn.invars[0]):
            casts[eqn.outvars[0]] = eqn
        elif read and eqn.primitive is mul_p and _is_inexact(eqn.outvars[0]):
            # A derivative has products with the same cast: they are no such calls.
            cast = casts.pop(read[0])
            if are_inlined(cast, eqn):
                found[id(eqn)] = _product(eqn, eqn.invars.index(read[0]))
    return found


def _is_boolean(atom: Any) -> bool:
    return atom.aval.dtype == bool


def _is_inexact(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _product(eqn: Any, k: int) -> Any:
    """Return a call in the place of a product; its operand `k` was boolean."""
    (call,) = _call_of(k, *(v.aval for v in eqn.invars)).eqns
    return call.replace(
        invars=eqn.invars,
        outvars=eqn.outvars,
        source_info=eqn.source_info,
        ctx=eqn.ctx,
    )


# Traced once for each pair of types, as `as_called` is asked at each evaluation.
@functools.lru_cache(4096)
def _call_of(k: int, *avals: Any) -> Any:
    def multiply(*operands: Any) -> Any:
        x, mask = operands[1 - k], operands[k].astype(bool)
        return jnp.multiply(*((mask, x) if k == 0 else (x, mask)))

    return jax.make_jaxpr(jax.jit(multiply))(*avals).jaxpr
