"""Rules that are handed a function which closes over an array: `nondiff_argnums`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)
stop = jax.lax.stop_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_vjp(f, a):
    return f(a)


by_vjp.defvjp(lambda f, a: (f(a), a), lambda f, a, g: (jax.vjp(f, a)[1](g)[0],))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def by_jvp(f, a):
    return f(a)


by_jvp.defjvp(jax.jvp)


class Layer:
    def __init__(self, w):
        self.w = w

    def apply(self, a):
        return a * self.w

    def __call__(self, a):
        return a * self.w


# A linear function by w: its slope is w, whatever holds it.
HELD = {
    "a function": lambda w: lambda a: a * w,
    "a function of a function": lambda w: lambda a: (lambda b: b * w)(a),
    "a partial": lambda w: functools.partial(jnp.multiply, w),
    "a method": lambda w: Layer(w).apply,
    "a callable": Layer,
    "a jitted function": lambda w: jax.jit(lambda a: a * w),
}
calls = pytest.mark.parametrize("call", [by_vjp, by_jvp])


def losses(call, held):
    """Return losses of (w, x), and their gradients by x."""
    made = HELD[held]
    return [
        (lambda w, x: call(made(w), x).sum(), W),
        (lambda w, x: call(made(jnp.sin(stop(w))), x).sum(), jnp.sin(W)),
        (lambda w, x: call(made(w), call(made(w), x)).sum(), W * W),
    ]


@pytest.mark.parametrize("held", HELD)
@calls
def test_gradients_past_what_is_not_differentiated(call, held):
    for fun, slopes in losses(call, held):
        for run in (lambda f: f, jax.jit):
            found = run(sg.gradients(fun, "x"))(W, X)
            np.testing.assert_allclose(found, slopes, rtol=1e-6)
        value, found = sg.value_and_gradients(fun, "x")(W, X)
        np.testing.assert_allclose(found, slopes, rtol=1e-6)
        np.testing.assert_allclose(value, jnp.sum(slopes * X), rtol=1e-6)
        stats = sg.gradient_stats(fun, "x")(W, X)["x"]
        np.testing.assert_allclose(stats.norm, jnp.linalg.norm(slopes), rtol=1e-6)
        sg.assert_gradient(fun, "x")(W, X)
        assert sg.find_nonfinite(fun, xs="x")(W, X) is None


@pytest.mark.parametrize("held", HELD)
@calls
def test_what_is_held_itself_has_no_gradient_there(call, held):
    """`jax.grad` raises, too."""
    fun, _ = losses(call, held)[0]
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(fun)(W, X)
    with pytest.raises(TypeError, match="closes over a value of the function around"):
        sg.gradients(fun, "w")(W, X)


@pytest.mark.parametrize("held", HELD)
@calls
def test_a_derivative_of_what_is_run_anew_says_it(call, held):
    def fun(w, x):
        return call(HELD[held](w), sg.name(x * 1, "h")).sum()

    captured = lambda w, x: sg.capture(fun, "h")(w, x)[0]
    np.testing.assert_allclose(captured(W, X), jnp.sum(W * X), rtol=1e-6)
    with pytest.raises(TypeError) as caught:
        jax.grad(captured, 1)(W, X)
    said = " ".join(str(caught.value).split())
    assert "capture(fun, 'h')" in said
    assert "test_closures_handed.py:" in said
    assert "which closes over a value of the function around it write: " in said


@pytest.mark.parametrize("held", HELD)
@calls
def test_a_constant_made_outside_is_as_before(call, held):
    def fun(x):
        return call(HELD[held](W), sg.name(x * 2, "h")).sum()

    np.testing.assert_allclose(sg.gradients(fun, "h")(X), W, rtol=1e-6)
    again = lambda x: sg.capture(fun, "h")(x)[0]
    np.testing.assert_allclose(jax.grad(again)(X), 2 * W, rtol=1e-6)
