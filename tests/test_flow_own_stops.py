"""What this package stops inside a call that passes the gradient on is no cut."""

import jax
import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg

X, Y = f32(0.3, 1.2, -0.8), f32(0.5, 0.2, -0.4)


def quantized(v):
    return jnp.round(v * 4) / 4


def square(v):
    return jnp.sum(v**2)


def through(y):
    z = sg.straight_through(quantized)(y)
    return jnp.sum(z)


def through_jit(y):
    return jnp.sum(sg.straight_through(jax.jit(quantized))(y))


def through_a_lambda(y):
    return jnp.sum(sg.straight_through(lambda v: v * 1.0)(y))


def in_a_loop(y):
    for _ in range(2):
        y = sg.straight_through(quantized)(y)
    return jnp.sum(y)


def in_a_scan(y):
    step = lambda c, _: (sg.straight_through(quantized)(c), None)
    return jnp.sum(jax.lax.scan(step, y, None, length=2)[0])


def twice(y):
    inner = sg.straight_through(quantized)
    return jnp.sum(sg.straight_through(lambda v: inner(v) * 1.0)(y))


def of_a_tree(y):
    both = sg.straight_through(lambda t: jax.tree.map(quantized, t))
    return sum(map(jnp.sum, both({"a": y, "b": 2.0 * y}).values()))


def backward(y):
    return sg.with_backward(square, lambda ct, out, v: (ct * v,))(y)


PASSING = [through, through_jit, through_a_lambda, in_a_loop, in_a_scan, twice]


@pytest.mark.parametrize("fun", [*PASSING, of_a_tree, backward])
def test_a_call_that_passes_the_gradient_on(fun):
    assert jnp.any(jax.grad(fun)(Y))
    flow = sg.flow(fun)(Y)
    assert flow.cuts == ()
    said = str(flow.explain("y"))
    assert said.startswith("y (f32[3]): can get a gradient.")
    assert "ends here" not in said
    assert "cut on purpose" not in str(flow.source())


def of_the_value_alone(x, y):
    return jnp.sum(sg.straight_through(lambda a, b: a * quantized(b))(x, y))


def of_another_backward(x, y):
    return jnp.sum(
        sg.straight_through(lambda a, b: quantized(a * b), jnp.maximum)(x, y)
    )


def test_an_argument_that_gets_none():
    """Its value is taken, and nobody wrote a stop."""
    assert not jnp.any(jax.grad(of_the_value_alone, 1)(X, Y))
    flow = sg.flow(of_the_value_alone)(X, Y)
    (cut,) = flow.cuts
    assert cut.words.startswith("straight_through takes its value and not its deriv")
    assert cut.inputs == ("y",)
    assert sg.flow(of_another_backward)(X, Y).cuts == ()


def test_a_backward_that_returns_none_is_told_alone():
    fun = lambda y: sg.with_backward(square, lambda ct, out, v: (None,))(y)
    (cut,) = sg.flow(fun)(Y).cuts
    assert cut.words == "the backward function returns None or zeros for it"


def test_a_stop_of_the_user_stays_one():
    def stopped(y):
        return jnp.sum(jax.lax.stop_gradient(sg.straight_through(quantized)(y)))

    def inside(y):
        return jnp.sum(sg.straight_through(quantized, jax.lax.stop_gradient)(y) + 0 * y)

    for fun in (stopped, inside):
        (cut,) = sg.flow(fun)(Y).cuts
        assert cut.words == "stop_gradient, on purpose"
        assert "stop_gradient" in cut.site.expr
