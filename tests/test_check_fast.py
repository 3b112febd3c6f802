"""What varies faster than differences can see: nobody is accused of it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


def logistic(steps):
    return lambda x: lax.fori_loop(0, steps, lambda _, x: 3.9 * x * (1 - x), x)


def _recurrent(w):
    step = lambda h, _: (jnp.tanh(w @ h), None)
    return jnp.sum(lax.scan(step, jnp.ones(16), None, length=50)[0])


W = np.random.RandomState(0).normal(size=(16, 16)).astype("float32")
FAST = {
    **{f"logistic {n}": (logistic(n), 0.3, False) for n in (22, 25, 30, 40, 60, 100)},
    "logistic 100 in float64": (logistic(100), 0.3, True),
    "sin": (jnp.sin, 1e6, False),
    "sin of more": (jnp.sin, 1e7, False),
    "440 Hz": (lambda t: jnp.sin(2 * jnp.pi * 440 * t), 1000.3, False),
    "1000 Hz": (lambda t: jnp.sin(2 * jnp.pi * 1000 * t), 1.7e9, True),
    "cos": (lambda x: jnp.cos(1e6 * x), 0.7, False),
    "recurrent": (_recurrent, W, False),
}


@pytest.mark.parametrize("name", FAST)
def test_it_cannot_be_settled(name):
    function, x, x64 = FAST[name]
    with jax.enable_x64(x64), pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(jnp.asarray(x, "float64" if x64 else "float32"))
    assert f"cannot be settled in {'float64' if x64 else 'float32'}" in str(
        caught.value
    )
    assert "kink" not in str(caught.value)


def test_a_right_rule_is_not_accused_there():
    own = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x),))
    with pytest.raises(AssertionError, match="cannot be settled"):
        sg.check_gradients(own)(1e6)


@pytest.mark.parametrize("factor", [1.5, -1.0, 1e6, 0.0])
@pytest.mark.parametrize("function", [jnp.square, jnp.sin, jnp.exp, jnp.abs])
def test_a_wrong_one_of_what_is_smooth_is_found(function, factor):
    backward = lambda ct, out, x: (ct * factor * jax.grad(function)(x),)
    wrong = sg.with_backward(function, backward)
    for x in (0.7, 1e-3, 30.0):
        with pytest.raises(AssertionError, match="is not the derivative of its fun"):
            sg.check_gradients(wrong)(x)


# Near a singular matrix ---------------------------------------------------------------


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 3e-4, 1e-4, 1e-5])
@pytest.mark.parametrize(
    "function",
    [
        lambda a: jnp.sum(jnp.linalg.inv(a)),
        lambda a: jnp.linalg.solve(a, f32(1, 2.5)),
    ],
    ids=["inverse", "solve"],
)
def test_near_a_singular_matrix_jax_is_not_accused(function, apart):
    matrix = f32(1, 2, 2, 4 + apart).reshape(2, 2)
    if apart >= 1e-3:
        sg.check_gradients(function)(matrix)
        return
    with contextlib.suppress(AssertionError):
        sg.check_gradients(function)(matrix)
        return
    with pytest.raises(AssertionError, match="cannot be settled in float32"):
        sg.check_gradients(function)(matrix)
