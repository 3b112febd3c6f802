"""Primitives that compile to nothing: `perturb` and `hold`, `edited`; and `shift`.

The first two hand their first operand on, bit for bit, and compile to nothing. What
they change is the derivative *of the call that made them*: their second operand is
always one of the variables that call differentiates by, so JAX hands each of
them to that call's trace and to no other. This is what makes a stop local to its
call: differentiate the result again, and the rule has already left only the
value, an ordinary function of its inputs.

`edited` marks what an edit returned, so that a debugger can tell whose it is. `shift`
is what users may perturb by: an addition, but none where nothing is added.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

import stopgrad_jax._jax as _jax
from stopgrad_jax._jax import Primitive

perturb_p = Primitive("perturb")  # value, perturbation -> value
hold_p = Primitive("hold")  # value, token -> value
shift_p = Primitive("shift")  # value, perturbation -> their sum
edited_p = Primitive("edited")  # value -> value


def perturb(value: Any, perturbation: Any) -> jax.Array:
    """Return `value`; its derivative is that of `value + perturbation`.

    Nobody but one call differentiates by this perturbation, which is zero.
    """
    return perturb_p.bind(value, perturbation)


def hold(value: Any, token: Any) -> jax.Array:
    """Return `value`; for the differentiation that owns `token`, a constant."""
    return hold_p.bind(value, token)


def shift(value: Any, perturbation: Any) -> jax.Array:
    """Return `value + perturbation`; `value`, bit for bit, where that is a known zero.

    Differentiated by a perturbation of zero, it leaves no instruction behind.
    """
    known = not _jax.is_traced(perturbation)
    if known and not np.any(np.asarray(perturbation) != 0):
        return value
    return shift_p.bind(value, _jax.sharded_like(perturbation, value))


def edited(value: Any, address: str) -> jax.Array:
    """Return `value`, marked as what an edit at this address returned."""
    return edited_p.bind(value, address=address)


def _perturb_jvp(primals: Any, tangents: Any) -> Any:
    # The call that the perturbation is of: it is done with, and leaves the value alone.
    if type(tangents[1]) is not ad.Zero:
        return primals[0], ad.add_tangents(*tangents)
    return perturb_p.bind(*primals), ad.add_tangents(*tangents)


def _shift_jvp(primals: Any, tangents: Any) -> Any:
    return shift(*primals), ad.add_tangents(*tangents)


def _hold_jvp(primals: Any, tangents: Any) -> Any:
    (value, token), (value_dot, token_dot) = primals, tangents
    if type(token_dot) is ad.Zero:  # another call's differentiation
        return hold_p.bind(value, token), value_dot
    return value, ad.Zero(jax.typeof(value).to_tangent_aval())


def _sum_transpose(ct: Any, value: Any, perturbation: Any) -> Any:
    return [ct if ad.is_undefined_primal(x) else None for x in (value, perturbation)]


def _hold_transpose(ct: Any, value: Any, token: Any) -> Any:
    return ct, None


def _in_front(bind: Any) -> Any:
    """Map a primitive of two values alike over examples."""

    # Both get the axis, as the transpose hands one cotangent to both.
    def batch(args: Any, dims: Any) -> Any:
        pairs = list(zip(args, dims, strict=True))
        size = next(x.shape[k] for x, k in pairs if k is not None)
        return bind(*(batching.bdim_at_front(x, k, size) for x, k in pairs)), 0

    return batch


def _hold_batch(args: Any, dims: Any) -> Any:
    return hold_p.bind(*args), dims[0]


def _edited_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return edited_p.bind(*primals, **params), tangents[0]


def _edited_transpose(ct: Any, value: Any, **params: Any) -> Any:
    return (ct,)


def _edited_batch(args: Any, dims: Any, **params: Any) -> Any:
    return edited_p.bind(*args, **params), dims[0]


def _value(value: Any, *_: Any, **params: Any) -> Any:
    return value


for _p, _run, _jvp, _transpose, _batch in (
    (perturb_p, _value, _perturb_jvp, _sum_transpose, _in_front(perturb)),
    (shift_p, jnp.add, _shift_jvp, _sum_transpose, _in_front(shift_p.bind)),
    (hold_p, _value, _hold_jvp, _hold_transpose, _hold_batch),
    (edited_p, _value, _edited_jvp, _edited_transpose, _edited_batch),
):
    _p.def_impl(_run)
    _p.def_abstract_eval(_value)
    ad.primitive_jvps[_p] = _jvp
    ad.primitive_transposes[_p] = _transpose
    batching.primitive_batchers[_p] = _batch
    mlir.register_lowering(_p, mlir.lower_fun(_run, multiple_results=False))
