"""Stops of this package's own: `with_backward` hands its arguments on through one."""

from __future__ import annotations

import os
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


def is_own_stop(eqn: Any) -> bool:
    """Tell a stop that a function of this package is made with, as `straight_through`.

    A user who reads a program has not written it.
    """
    if _jax.kind_of(eqn) != "stop_gradient":
        return False
    code = _jax.stopped_in(eqn)
    return is_handed(eqn) or (code is not None and _jax.is_of_package(code.co_filename))


def is_straight_through(eqn: Any) -> bool:
    """Tell the stop of what `straight_through` takes the value of alone."""
    code = _jax.stopped_in(eqn)
    return code is not None and (code.co_filename, code.co_qualname) == _STOPPED


_STOPPED = (
    os.path.join(_jax.PACKAGE, "substitution.py"),
    "_stopped.<locals>.<lambda>",
)


def _jvp(primals: Any, tangents: Any) -> Any:
    zero = ad.Zero(jax.typeof(primals[0]).to_tangent_aval())
    return handed_p.bind(*primals), zero


handed_p.def_impl(lambda x: x)
handed_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[handed_p] = _jvp
batching.primitive_batchers[handed_p] = lambda args, dims: (handed(*args), dims[0])
mlir.register_lowering(handed_p, lambda ctx, x: [x])
