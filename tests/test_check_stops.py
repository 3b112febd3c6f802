"""Which rules may give the derivative of what is stopped beside them, and which not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32
from solvers import solved_by_rule, stopped_solve

import stopgrad_jax as sg

X = f32(0.4, -0.7, 1.2)
MATRIX, B = f32(2.0, 0.3, 0.2, 1.5).reshape(2, 2), f32(1.0, -0.5)
pytestmark = pytest.mark.usefixtures("usual_settings")


def rule(function, backward):
    custom = jax.custom_vjp(function)
    custom.defvjp(lambda *a: (function(*a), a), lambda r, ct: backward(ct, *r))
    return custom


product = lambda x, s: x * s
dot = lambda p, v, q: jnp.sum(p * v) + q
stopped = lambda x: lax.stop_gradient(0.5 * jnp.sum(x**2))

TWICE = rule(product, lambda ct, x, s: (ct * 2 * x, jnp.zeros_like(s)))
ATTENDS = rule(dot, lambda ct, p, v, q: (ct * v, ct * (p + v), ct))
BOTH = rule(product, lambda ct, x, s: (ct * 3 * x**2, ct * x))

# Each uses the operand whose derivative is wrong, and un-stopping makes its sum right:
# a program, and the same with the product that is declared instead of the rule.
WRONG = {
    "factor": (lambda g, x: g(x, lax.stop_gradient(x)), TWICE, product),
    "dot": (lambda g, x: g(jnp.ones(3), x, stopped(x)), ATTENDS, dot),
    "dot with zeros": (lambda g, x: g(jnp.zeros(3), x, stopped(x)), ATTENDS, dot),
    "square": (lambda g, x: g(x, lax.stop_gradient(x**2)), BOTH, product),
    "in a scan": (
        lambda g, x: lax.scan(lambda c, x: (c, g(x, lax.stop_gradient(x))), 0.0, x)[1],
        TWICE,
        product,
    ),
    "of two leaves": (
        lambda g, x: g(jnp.sin(x), lax.stop_gradient(jnp.sin(x))) * x,
        TWICE,
        product,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_un_stopping_makes_right_is_wrong(name):
    program, wrong, right = WRONG[name]
    told, declared = (
        jax.grad(lambda x, g=g: jnp.sum(program(g, x)))(X) for g in (wrong, right)
    )
    assert not np.allclose(told, declared, rtol=0.01)
    with pytest.raises(AssertionError, match="is not the derivative of its function"):
        sg.check_gradients(lambda x: program(wrong, x))(X)
    sg.check_gradients(lambda x: program(right, x))(X)


# The function uses what was solved and stopped; the rule is told the equation.
IMPLICIT = {
    # y**2 = t
    "root": (
        rule(lambda t, y: y, lambda ct, t, y: (ct / (2 * y), jnp.zeros_like(y))),
        lambda x: jnp.sqrt(1 + x**2),
        lambda x: 1 + x**2,
    ),
    # y**3 + y = t
    "cubic": (
        rule(lambda t, y: y * 1, lambda ct, t, y: (ct / (3 * y**2 + 1), 0 * y)),
        lambda x: x,
        lambda x: x**3 + x,
    ),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_rule_for_what_its_function_ignores_may_stand_for_a_stop(name):
    implicit, solve, equation = IMPLICIT[name]

    def function(x):
        solution = lax.stop_gradient(solve(x))
        return implicit(equation(x), solution) * x

    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.sum(function(x)))(X),
        jax.grad(lambda x: jnp.sum(solve(x) * x))(X),
        rtol=1e-5,
    )
    sg.check_gradients(function)(X)
    wrong = lambda x: implicit(2 * equation(x), lax.stop_gradient(solve(x)))
    with pytest.raises(AssertionError, match="is not the derivative of its function"):
        sg.check_gradients(wrong)(X)


@pytest.mark.parametrize("solve", [stopped_solve, solved_by_rule], ids=["own", "jvp"])
def test_a_wrong_rule_beside_a_solver_is_found(solve):
    """The stops that are freed for the one are none for the other."""
    both = lambda a, x: solve(a, B) * TWICE(x, lax.stop_gradient(x))
    with pytest.raises(AssertionError, match="is not the derivative of its function"):
        sg.check_gradients(both)(MATRIX, B)


def test_the_same_rule_wrong_by_a_later_leaf():
    """Right by the equation, which stands for the stopped solution; wrong by `s`."""
    backward = lambda ct, t, y, s: (ct * s / (2 * y), jnp.zeros_like(y), 2 * ct * y)
    implicit = rule(lambda t, y, s: y * s, backward)
    f = lambda x, s: implicit(1 + x**2, lax.stop_gradient(jnp.sqrt(1 + x**2)), s)
    with pytest.raises(AssertionError, match="is not the derivative of its function"):
        sg.check_gradients(f)(X, X + 2)
