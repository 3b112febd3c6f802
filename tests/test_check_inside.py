"""Rules, stops and gates inside JAX's own rules, where nobody gets at them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
WRONG = "is not the derivative of its function"


@jax.custom_jvp
def by_jvp(x):
    return x**2


by_jvp.defjvp(lambda p, t: (p[0] ** 2, 3 * p[0] * t[0]))


@jax.custom_vjp
def by_vjp(x):
    return x**2


by_vjp.defvjp(lambda x: (x**2, x), lambda x, ct: (3 * x * ct,))
by_gate = sg.with_backward(lambda x: x**2, lambda ct, out, x: (3 * x * ct,))
right = sg.with_backward(lambda x: x**2, lambda ct, out, x: (2 * x * ct,))

DYNAMICS = {
    "argument": lambda square: (
        lambda k: odeint(lambda y, t, k: -square(k) * y, 1.0, f32(0, 1), k)[1]
    ),
    "closed over": lambda square: (
        lambda k: odeint(lambda y, t: -square(k) * y, 1.0, f32(0, 1))[1]
    ),
    "of the state": lambda square: (
        lambda k: odeint(lambda y, t, k: -square(y) * k, 1.0, f32(0, 1), k)[1]
    ),
    "cg": lambda square: (
        lambda k: jnp.sum(
            jax.scipy.sparse.linalg.cg(lambda v: square(k) * v + v, f32(1, 2))[0]
        )
    ),
}


@pytest.mark.parametrize("square", [by_jvp, by_vjp, by_gate], ids=["j", "v", "gate"])
@pytest.mark.parametrize("name", DYNAMICS)
def test_a_wrong_rule_inside_one_of_jax_is_found(name, square):
    x = jnp.float32(1.3)
    declared = jax.grad(DYNAMICS[name](lambda x: x * x))(x)
    function = DYNAMICS[name](square)
    assert not np.allclose(jax.grad(function)(x), declared, rtol=0.1)
    with pytest.raises(AssertionError, match=WRONG) as caught:
        sg.check_gradients(function)(x)
    (told,) = re.findall(r"function: (\S+) by differences", str(caught.value))
    np.testing.assert_allclose(float(told), declared, rtol=1e-3)


@pytest.mark.parametrize("name", DYNAMICS)
def test_right_ones_pass_there(name):
    for square in (lambda x: x * x, right):
        sg.check_gradients(DYNAMICS[name](square))(jnp.float32(1.3))
    sg.check_gradients(DYNAMICS[name](by_jvp), allow=["by_jvp"])(jnp.float32(1.3))


def test_in_float64():
    with jax.enable_x64(True):
        ode = lambda square: (
            lambda k: odeint(lambda y, t, k: -square(k) * y, 1.0, jnp.arange(2.0), k)[1]
        )
        sg.check_gradients(ode(jnp.square))(jnp.float64(1.3))
        with pytest.raises(AssertionError, match=WRONG):
            sg.check_gradients(ode(by_jvp))(jnp.float64(1.3))


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: x * lax.stop_gradient(x),
        lambda x: sg.scale_gradient(x, 0.5) ** 2,
        lambda x: sg.clip_gradient(x, -1e-3, 1e-3) ** 2,
    ],
    ids=["stop", "scale", "clip"],
)
def test_what_is_declared_inside_is_taken_at_its_word(gate):
    sg.check_gradients(DYNAMICS["argument"](gate))(jnp.float32(1.3))


# Solvers ------------------------------------------------------------------------------

A, B = f32(2, 1, 0, 4).reshape(2, 2), f32(1, 2)
EXACT = lambda matvec, b: jnp.linalg.solve(A, b)
TURNED = lambda vecmat, b: jnp.linalg.solve(A.T, b)
INVERSE = lambda matvec, b: jnp.linalg.inv(A) @ b


def _linear(solve, transposed, symmetric=False):
    return lambda b: lax.custom_linear_solve(
        lambda v: A @ v, b, solve, transposed, symmetric=symmetric
    )


WRONG_SOLVES = {
    "not symmetric": _linear(EXACT, None, symmetric=True),
    "by the inverse": _linear(INVERSE, None, symmetric=True),
    "transposed": _linear(EXACT, lambda vecmat, b: 7 * b),
    "solve": _linear(lambda matvec, b: 3 * b, TURNED),
    "stopped": _linear(lambda matvec, b: lax.stop_gradient(EXACT(matvec, b)), EXACT),
}


@pytest.mark.parametrize("name", WRONG_SOLVES)
@pytest.mark.parametrize("modes", [("rev",), ("rev", "fwd")], ids=["rev", "both"])
def test_what_jax_stops_in_a_solver_is_no_stop(name, modes):
    solve = WRONG_SOLVES[name]
    told, declared = jax.jacrev(solve)(B), jax.jacfwd(solve)(B)
    assert not np.allclose(told, declared, rtol=0.1)
    said = "the rule of custom_linear_solve .*" + WRONG
    with pytest.raises(AssertionError, match=said):
        sg.check_gradients(solve, modes=modes)(B)


def test_right_solvers_pass():
    for solve in (EXACT, INVERSE):
        check = sg.check_gradients(_linear(solve, TURNED), modes=("rev", "fwd"))
        check(B)


def _root(function, solve, tangent):
    return lambda a: lax.custom_root(
        functools.partial(function, a), 1.0, solve(a), tangent
    )


newton = lambda a: lambda f, y: lax.fori_loop(0, 20, lambda _, y: y - f(y) / (2 * y), y)
stopped = lambda a: lambda f, y: lax.stop_gradient(jnp.sqrt(a))
square_less = lambda a, y: y**2 - a
divide = lambda g, y: y / g(1.0)


def test_a_stop_in_what_solves_is_none():
    """The rule goes by the equation, and differentiates no solver."""
    for solve in (newton, stopped, lambda a: lambda f, y: jnp.sqrt(a)):
        f = _root(square_less, solve, divide)
        np.testing.assert_allclose(jax.grad(f)(2.0), 0.5 / np.sqrt(2), rtol=1e-5)
        sg.check_gradients(f)(2.0)
        with pytest.raises(AssertionError, match=WRONG):
            sg.check_gradients(_root(square_less, solve, lambda g, y: y))(2.0)


@pytest.mark.parametrize("solve", [newton, lambda a: lambda f, y: 0 * f(y) + 1])
def test_a_stop_in_the_equation_is_one(solve):
    f = _root(lambda a, y: (y - 1) * (y + lax.stop_gradient(a)), solve, divide)
    assert jax.grad(f)(2.0) == 0
    sg.check_gradients(f)(2.0)
