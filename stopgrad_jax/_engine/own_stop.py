"""A stop of this package's own: `with_backward` hands its arguments on through it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

import stopgrad_jax._jax as _jax

# It has the name of JAX's own, so that whoever reads a program reads a stop. That it is
# none of the user's is a fact of the primitive, and not of the scope that it is in.
handed_p = _jax.Primitive("stop_gradient")


def handed(x: Any) -> jax.Array:
    """Return `x` without its derivative, which goes around the function it is for."""
    return handed_p.bind(jnp.asarray(x))


def is_handed(eqn: Any) -> bool:
    """Tell such a stop from one that a user wrote."""
    return eqn.primitive is handed_p


def _jvp(primals: Any, tangents: Any) -> Any:
    zero = ad.Zero(jax.typeof(primals[0]).to_tangent_aval())
    return handed_p.bind(*primals), zero


handed_p.def_impl(lambda x: x)
handed_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[handed_p] = _jvp
batching.primitive_batchers[handed_p] = lambda args, dims: (handed(*args), dims[0])
mlir.register_lowering(handed_p, lambda ctx, x: [x])
