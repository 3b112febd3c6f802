"""Two primitives that exist only for differentiation: `perturb` and `hold`.

Both hand their first operand on, bit for bit, and compile to nothing. What they
change is the derivative *of the call that made them*: their second operand is
always one of the variables that call differentiates by, so JAX hands each of
them to that call's trace and to no other. This is what makes a stop local to its
call: differentiate the result again, and the rule has already left only the
value, an ordinary function of its inputs.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from stopgrad_jax._jax import Primitive

perturb_p = Primitive("perturb")  # value, perturbation -> value
hold_p = Primitive("hold")  # value, token -> value


def perturb(value: Any, perturbation: Any, *, once: bool) -> jax.Array:
    """Return `value`; its derivative is that of `value + perturbation`.

    `once`: nobody but one call differentiates by this perturbation, so its rule
    leaves the bare value behind. Otherwise (a Hessian) the rule applies again.
    """
    return perturb_p.bind(value, perturbation, once=once)


def hold(value: Any, token: Any) -> jax.Array:
    """Return `value`; for the differentiation that owns `token`, a constant."""
    return hold_p.bind(value, token)


def _perturb_jvp(primals: Any, tangents: Any, *, once: bool) -> Any:
    if once and type(tangents[1]) is not ad.Zero:
        return primals[0], ad.add_tangents(*tangents)
    return perturb_p.bind(*primals, once=once), ad.add_tangents(*tangents)


def _hold_jvp(primals: Any, tangents: Any) -> Any:
    (value, token), (value_dot, token_dot) = primals, tangents
    if type(token_dot) is ad.Zero:  # another call's differentiation
        return hold_p.bind(value, token), value_dot
    return value, ad.Zero(jax.typeof(value).to_tangent_aval())


def _perturb_transpose(ct: Any, value: Any, perturbation: Any, *, once: bool) -> Any:
    return [ct if ad.is_undefined_primal(x) else None for x in (value, perturbation)]


def _hold_transpose(ct: Any, value: Any, token: Any) -> Any:
    return ct, None


def _perturb_batch(args: Any, dims: Any, *, once: bool) -> Any:
    (value, perturbation), (d, e) = args, dims
    size = next(x.shape[k] for x, k in zip(args, dims, strict=True) if k is not None)
    value = batching.bdim_at_front(value, d, size)
    perturbation = batching.bdim_at_front(perturbation, e, size)
    return perturb_p.bind(value, perturbation, once=once), 0


def _hold_batch(args: Any, dims: Any) -> Any:
    return hold_p.bind(*args), dims[0]


for _p, _jvp, _transpose, _batch in (
    (perturb_p, _perturb_jvp, _perturb_transpose, _perturb_batch),
    (hold_p, _hold_jvp, _hold_transpose, _hold_batch),
):
    _p.def_impl(lambda value, _, **params: value)
    _p.def_abstract_eval(lambda value, _, **params: value)
    ad.primitive_jvps[_p] = _jvp
    ad.primitive_transposes[_p] = _transpose
    batching.primitive_batchers[_p] = _batch
    mlir.register_lowering(_p, lambda ctx, value, _, **params: [value])
