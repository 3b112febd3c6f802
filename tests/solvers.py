"""Linear solvers as libraries write them: a stopped factorization beside the matrix."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, mlir

import stopgrad_jax._jax as _jax


def _from_inverse(matrix, inverse, b):
    return inverse @ b


def _right_side(out, dots, wrong):
    d_matrix, d_b = dots
    return d_b - (0.5 if wrong else 1) * (d_matrix @ out)


def _primitive(wrong):
    solve_p = _jax.Primitive("my_solve_wrong" if wrong else "my_solve")

    def derivative(primals, tangents):
        assert type(tangents[1]) is ad.Zero, "the factorization is stopped"
        out = solve_p.bind(*primals)
        dots = [ad.instantiate_zeros(tangents[k]) for k in (0, 2)]
        right_side = _right_side(out, dots, wrong)
        return out, solve_p.bind(primals[0], primals[1], right_side)

    solve_p.def_impl(_from_inverse)
    solve_p.def_abstract_eval(lambda matrix, inverse, b: b)
    ad.primitive_jvps[solve_p] = derivative
    ad.primitive_transposes[solve_p] = lambda ct, matrix, inverse, b: [
        *(None, None, solve_p.bind(matrix.T, inverse.T, ct)),
    ]
    mlir.register_lowering(solve_p, mlir.lower_fun(_from_inverse, False))
    return solve_p


_PRIMITIVES = {wrong: _primitive(wrong) for wrong in (False, True)}


def stopped_solve(matrix, b, wrong=False):
    """Solve by a primitive with an implicit derivative."""
    inverse = lax.stop_gradient(jnp.linalg.inv(lax.stop_gradient(matrix)))
    return _PRIMITIVES[wrong].bind(matrix, inverse, b)


def solved_by_rule(matrix, b, wrong=False):
    """Solve by a function with an implicit derivative."""

    @jax.custom_jvp
    def by_inverse(matrix, inverse, b):
        return inverse @ b

    @by_inverse.defjvp
    def _(primals, tangents):
        out = by_inverse(*primals)
        right_side = _right_side(out, (tangents[0], tangents[2]), wrong)
        return out, by_inverse(primals[0], primals[1], right_side)

    inverse = lax.stop_gradient(jnp.linalg.inv(matrix))
    return by_inverse(matrix, inverse, b)


def solved(x):
    """Solve by JAX itself, which stops its own factorization."""
    return jnp.linalg.solve(jnp.diag(x) + 1, x**2)
