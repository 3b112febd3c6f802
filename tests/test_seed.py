"""Every row of the article, against what TensorFlow printed for it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stopgrad_jax as sg

GOLDEN = json.loads((pathlib.Path(__file__).parent / "seed_golden.json").read_text())
X, Y = (np.array(GOLDEN[k], np.float32) for k in "xy")


def loss(w, b, x, y):
    return jnp.sum((y - (x * w + b)) ** 2) / (2 * 32)


def assert_told(rows, golden):
    for row, told in zip(rows, golden, strict=True):
        for key in ("w", "b"):
            assert row[key] == pytest.approx(told[key], rel=1e-5)
        for key in ("loss", "grad_w"):
            assert row[key] == pytest.approx(told[key], abs=1e-4)


def test_a_read_the_gradient_while_an_optimizer_trains():
    params = {"w": jnp.float32(2), "b": jnp.float32(1)}
    optimizer = optax.sgd(0.01)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        fun = lambda p: loss(p["w"], p["b"], x, y)
        value, grads = sg.value_and_gradients(fun, "p")(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads["w"]

    rows = []
    for x, y in zip(X[:20], Y[:20], strict=True):
        params, state, value, grad = step(params, state, x, y)
        rows.append({**params, "loss": value, "grad_w": grad})
    assert_told(rows, GOLDEN["A"])


def test_b_your_own_update():
    w, b = jnp.float32(2), jnp.float32(1)
    rows = []
    for x, y in zip(X[:20], Y[:20], strict=True):
        value, (dw, db) = sg.value_and_gradients(loss, ["w", "b"])(w, b, x, y)
        w, b = w - jnp.float32(0.01) * dw, b - jnp.float32(0.01) * db
        rows.append({"w": w, "b": b, "loss": value, "grad_w": dw})
    assert_told(rows, GOLDEN["B"])


def test_c_intermediates_and_stops():
    def c(x):
        a = sg.name(x, "a")
        b = sg.name(2 * a, "b")
        return a + b

    assert sg.gradients(c, ["a", "b"])(0.0) == [3.0, 1.0]
    assert sg.gradients(c, ["a", "b"], stop_gradients=["a", "b"])(0.0) == [1.0, 1.0]


def test_d_a_stop_that_disconnects():
    b = lambda w1, w2: jax.lax.stop_gradient(3 * w1) * w2
    assert sg.gradients(b, ["w1", "w2"])(2.0, 2.0) == [None, 6.0]


def test_e_a_stop_that_another_path_goes_round():
    e = lambda a, b: jax.lax.stop_gradient(a + b) + (a + b)
    assert sg.gradients(e, ["a", "b"])(1.0, 1.0) == [1.0, 1.0]


def test_the_opening_question():
    y = lambda xx: xx + jax.lax.stop_gradient(jnp.round(xx) - xx)
    value, grad = sg.value_and_gradients(y, "xx")(2.7)
    assert (value, grad) == (3.0, 1.0)
    assert sg.gradients(jnp.round, 0)(2.7) is None


# TensorFlow's semantics, row by row of what was observed on it.


def test_total_also_through_other_xs():
    def f(x):
        return x + sg.name(2 * x, "y")

    assert sg.gradients(f, ["x", "y"])(1.0) == [3.0, 1.0]


def test_empty_ys_give_none():
    assert sg.gradients(lambda x: x, "x", ys=[])(1.0) is None


def test_a_stop_on_y_cuts_everything_upstream():
    f = lambda x: sg.name(x * x, "y")
    assert sg.gradients(f, ["x", "y"], ys="y", stop_gradients="y")(3.0) == [None, 1.0]


def test_zeros_not_none():
    assert sg.gradients(lambda x: x * 0, "x")(1.0) == 0.0
    branch = lambda x, z: jax.lax.cond(False, lambda: x, lambda: z)
    assert sg.gradients(branch, ["x", "z"])(1.0, 2.0) == [0.0, 1.0]


def test_stopping_one_output_leaves_its_sibling():
    def f(x):
        a, b = jnp.split(x, 2)
        return jnp.sum(sg.name(a, "a") + 3 * b)

    np.testing.assert_allclose(
        sg.gradients(f, "x", stop_gradients="a")(jnp.ones(4, jnp.float32)), [0, 0, 3, 3]
    )
