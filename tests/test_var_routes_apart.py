"""`sg.var` of a parameter where no other way leads to its array: as it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from programs import f32
from routes import Net, tree, two

import stopgrad_jax as sg

X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)


def test_other_arrays_are_no_second_way():
    def model(x):
        h = jnp.tanh(x)
        before = jnp.sum(h) * 0.0
        return two(a=h, b=h * 2.0) + before

    h = jnp.tanh(X)
    found = sg.gradients(model, [sg.var("two.a"), sg.var("two.b")])(X)
    np.testing.assert_allclose(found[0], jnp.cos(h) * 2 * h, rtol=1e-5)
    np.testing.assert_allclose(found[1], jnp.sin(h), rtol=1e-5)


def test_an_object_that_does_not_hold_it():
    def model(x, w):
        net = Net(w)
        h = jnp.tanh(x)
        return net.out(h) + net.through(jnp.cos(x))

    found = sg.gradients(model, sg.var("out.z"))(X, W)
    np.testing.assert_allclose(found[0], 2 * W, rtol=1e-5)
    np.testing.assert_allclose(found[1], 2 * W, rtol=1e-5)
    values = sg.capture(model, sg.var("out.z"))(X, W)[1][sg.var("out.z")]
    np.testing.assert_allclose(values[1], jnp.cos(X), rtol=1e-5)


def test_a_shape_is_no_second_way():
    def sized(p, n, scale):
        return jnp.sum(p * scale) / n

    def model(x):
        h = jnp.tanh(x)
        return sized(h, h.shape[0], scale=len(h))

    found = sg.gradients(model, sg.var("sized.p"))(X)
    np.testing.assert_allclose(found, jnp.ones(3), rtol=1e-5)


def test_a_container_of_what_was_made_of_it():
    def model(x):
        h = jnp.tanh(x)
        return tree(h, {"z": jnp.exp(h), "w": h * 2.0})

    h = jnp.tanh(X)
    found = sg.gradients(model, sg.var("tree.a"))(X)
    np.testing.assert_allclose(found, jnp.cos(jnp.exp(h)), rtol=1e-5)


def test_a_container_that_holds_it_and_is_not_read():
    def mixed(p, cache):
        return jnp.sum(p * cache["other"])

    def model(x):
        h = jnp.tanh(x)
        return mixed(h, {"z": h, "other": jnp.exp(x)})

    found = sg.gradients(model, sg.var("mixed.p"))(X)
    np.testing.assert_allclose(found, jnp.exp(X), rtol=1e-5)


def test_a_closure_over_something_else():
    def model(x, w):
        h = jnp.tanh(x)
        k = jnp.exp(h)

        def fn(q):
            act = lambda u: jnp.sin(u) * k
            return jnp.sum(act(q) * w)

        return fn(h)

    found = sg.gradients(model, sg.var("fn.q"))(X, W)
    h = jnp.tanh(X)
    np.testing.assert_allclose(found, jnp.cos(h) * jnp.exp(h) * W, rtol=1e-5)


def test_an_inner_name_of_the_parameter_is_no_second_way():
    def model(x):
        def fn(q):
            total = jnp.sin(q)
            for part in (q, q):
                total = total + part
            kept = {"q": q}
            inner = lambda: jnp.sum(kept["q"]) * 0.0
            return jnp.sum(total) + inner()

        return fn(jnp.tanh(x))

    found = sg.gradients(model, sg.var("fn.q"))(X)
    np.testing.assert_allclose(found, jnp.cos(jnp.tanh(X)) + 2, rtol=1e-5)


def test_a_module_that_hands_one_array_to_two_methods():
    class Block:
        def __init__(self, w):
            self.w = w

        def gate(self, u):
            return jax.nn.softmax(u) * self.w

        def value(self, u):
            return jnp.sin(u) @ self.w

        def __call__(self, u):
            return jnp.sum(self.gate(u)) * self.value(jnp.cos(u))

    def model(x, w):
        block = Block(w)
        return block(jnp.tanh(x)) + block(x * 2.0)

    address = sg.var("Block.value.u")
    values = sg.capture(model, address)(X, W)[1][address]
    np.testing.assert_allclose(values[0], jnp.cos(jnp.tanh(X)), rtol=1e-5)
    np.testing.assert_allclose(values[1], jnp.cos(X * 2), rtol=1e-5)


def test_a_partial_of_another_array():
    def model(x, w):
        fn = functools.partial(Net(w).out)
        return fn(jnp.tanh(x))

    found = sg.gradients(model, sg.var("Net.out.z"))(X, W)
    np.testing.assert_allclose(found, 2 * W, rtol=1e-5)
