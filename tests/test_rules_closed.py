"""Custom rules of functions that close over a value which is differentiated."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, 1.2, -0.8)
stop = jax.lax.stop_gradient
KINDS = ("jvp", "vjp")


def make(kind, again, extra):
    """A loss of x and y whose rule is of x alone; `again`: the rule reads y, too."""

    def loss(x, y):
        inner = (lambda a: a * y) if kind == "vjp" else jax.custom_jvp(lambda a: a * y)
        value = (lambda a: inner(a)) if again else (lambda a: a * 2.0)
        if kind == "jvp":
            f = inner
            f.defjvp(lambda p, t: (value(*p), t[0] * 2))
        else:
            f = jax.custom_vjp(inner)
            f.defvjp(lambda a: (value(a), None), lambda _, ct: (ct * 2,))
        return f(x).sum() + extra * y.sum() if extra else f(x).sum()

    return loss


AROUND = {
    "plain": lambda k: k,
    "jit": lambda k: lambda x, y: jax.jit(k)(x, y),
    "stopped": lambda k: lambda x, y: k(stop(x), y),
    "remat": lambda k: lambda x, y: jax.checkpoint(k)(x, y),
    "vmap": lambda k: lambda x, y: jax.vmap(k)(x[None], y[None]).sum(),
    "scan": lambda k: (
        lambda x, y: jax.lax.scan(
            lambda c, _: (c + k(x, y), None), 0.0, None, length=2
        )[0]
    ),
}


def truth(fun):
    """Return what `jax.grad` by y gives, or the name of what it raises."""
    try:
        return jax.grad(fun, 1)(X, X)
    except Exception as error:  # whatever JAX raises
        return type(error).__name__


@pytest.mark.parametrize("extra", [0.0, 1.0], ids=["only", "and beside"])
@pytest.mark.parametrize("again", [True, False], ids=["again", "once"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", AROUND)
def test_what_a_rule_closes_over_fares_as_jax_grad_says(around, kind, again, extra):
    fun = AROUND[around](make(kind, again, extra))
    grad, flow = truth(fun), sg.flow(fun)(X, X)
    status = {row.path: row.status for row in flow.inputs}["y"]
    if isinstance(grad, str):
        assert status == "unknown"
        words = str(flow.explain("y")).split("\n")[0]
        assert f"jax.grad raises at f (tests/test_rules_closed.py:{_line()})" in words
        assert f"{grad}: " in words
        for contract in (sg.assert_gradient, sg.assert_no_gradient):
            with pytest.raises(AssertionError, match=r"jax\.grad raises"):
                contract(fun, "y")(X, X)
        if kind == "jvp" and not again:  # its rule needs nothing of y: as if jitted
            found = sg.gradients(fun, "y")(X, X)
            np.testing.assert_array_equal(found, jax.grad(jax.jit(fun), 1)(X, X))
            return
        with pytest.raises(Exception, match=r"close|sg\.with_backward"):
            sg.gradients(fun, "y")(X, X)
        return
    assert status == ("flows" if np.any(grad) else "cut")
    found = sg.gradients(fun, "y", unconnected_gradients="zero")(X, X)
    np.testing.assert_array_equal(found, grad)


def _line():
    """The line at which the function with the rule is called."""
    lines, first = inspect.getsourcelines(make)
    return first + next(k for k, text in enumerate(lines) if "return f(x)" in text)


@pytest.mark.parametrize("kind", KINDS)
def test_which_program_raises_what(kind):
    """The table itself: what JAX does with these, to be seen where it changes."""
    assert truth(make(kind, True, 1.0)) == "UnexpectedTracerError"
    assert truth(make(kind, False, 0.0)) == "UnexpectedTracerError"
    jitted = truth(AROUND["jit"](make(kind, True, 1.0)))
    assert jitted == ("TypeError" if kind == "jvp" else "CustomVJPException")
    once = truth(AROUND["jit"](make("jvp", False, 0.0)))
    assert np.array_equal(once, jnp.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_that_is_closed_over_and_does_not_move_is_right(kind):
    fun = lambda x: make(kind, True, 0.0)(x, jnp.ones(3))
    np.testing.assert_array_equal(jax.grad(fun)(X), f32(2, 2, 2))
    assert sg.flow(fun)(X).inputs[0].status == "flows"
    np.testing.assert_array_equal(sg.gradients(fun, "x")(X), f32(2, 2, 2))
    stopped = lambda x, y: make(kind, True, 0.0)(x, stop(y))
    assert not isinstance(truth(stopped), str)
    status = [row.status for row in sg.flow(stopped)(X, X).inputs]
    assert status == ["flows", "cut"]
