"""Fresh, traced once, exact, and no more than asked for: also compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import instructions, primitives

import stopgrad_jax as sg


def test_closures_are_read_anew_but_jit_traces_once():
    scale = {"s": 2.0}
    traces = []

    def f(x):
        traces.append(1)
        return scale["s"] * x

    grad = sg.gradients(f, "x")
    assert grad(1.0) == 2.0
    scale["s"] = 3.0
    assert grad(1.0) == 3.0
    jitted = jax.jit(grad)
    jitted(1.0)
    count = len(traces)
    jitted(2.0)
    assert len(traces) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_exact(dtype, run):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, -0.0, 0.0, 1e-40, 3.0]).astype(dtype)
    f = lambda x: sg.name(x, "h")
    value, _ = run(sg.value_and_gradients(f, ["x", "h"], stop_gradients="h"))(x)
    assert value.dtype == x.dtype
    np.testing.assert_array_equal(
        np.array(value).view(np.uint8), np.array(x).view(np.uint8)
    )


def test_only_what_is_asked_for_is_computed():
    def f(w, v, x):
        h = sg.name(jnp.tanh(x @ w), "h")
        return {
            "loss": jnp.sum(h @ v),
            "metric": jnp.sum(jnp.log(h)),
            "sin": jnp.sin(x),
        }

    args = (jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.ones((2, 3)))
    ask = functools.partial(sg.gradients, f, ys="return/loss")
    names = primitives(ask("v"), *args)
    # forward x @ w, and h.T @ ct: neither h @ v nor anything of w, x, metric or sin
    assert names.count("dot_general") <= 3
    assert not {"log", "sin"} & set(names)
    names = primitives(ask("h"), *args)
    assert not {"log", "sin"} & set(names)
    by_hand = primitives(
        lambda w, v, x: jax.grad(lambda h: jnp.sum(h @ v))(jnp.tanh(x @ w)), *args
    )
    assert names.count("dot_general") <= by_hand.count("dot_general")
    assert primitives(ask("w", stop_gradients="h"), *args) == []


def test_no_more_instructions_than_by_hand():
    """A named point in the middle, in a scan, and with a stop: as if split by hand."""
    w, v, x = jnp.ones((3, 4)), jnp.ones((4, 4)), jnp.ones((2, 3))

    def f(w, v, x):
        h = sg.name(jnp.tanh(x @ w), "h")
        return jnp.sum(jnp.sin(h @ v))

    def split(w, v, x):
        return jax.grad(lambda h: jnp.sum(jnp.sin(h @ v)))(jnp.tanh(x @ w))

    assert instructions(sg.gradients(f, "h"), w, v, x) <= instructions(split, w, v, x)

    def held(w, v, x):
        def loss(v):
            return jnp.sum(jnp.sin(jax.lax.stop_gradient(jnp.tanh(x @ w)) @ v))

        return jax.grad(loss)(v)

    stopped = sg.gradients(f, "v", stop_gradients="h")
    assert instructions(stopped, w, v, x) <= instructions(held, w, v, x)

    def scanned(stop):
        def run(c, xs):
            def step(c, x):
                return stop(sg.name(jnp.tanh(c @ v + x), "h")) * 0.5 + x, None

            return jnp.sum(jax.lax.scan(step, c, xs)[0])

        return run

    c, xs = jnp.ones((2, 4)), jnp.ones((5, 2, 4))
    ours = sg.gradients(scanned(lambda h: h), "xs", stop_gradients="h")
    theirs = jax.grad(scanned(jax.lax.stop_gradient), 1)
    assert instructions(ours, c, xs) <= instructions(theirs, c, xs)
