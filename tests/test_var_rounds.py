"""`sg.var` where one execution of a statement makes an operation, and another none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)
BEATS = (
    r"(?s)^[^\n]+: [^\n]+\n  got:   in another round or call .+\n  write: .*sg\.name"
)


def cast(a, b):
    s = 0.0
    for v in (jax.lax.stop_gradient(a.astype(jnp.bfloat16)), b):
        h = v.astype(jnp.float32)
        s = s + jnp.sum(h * h)
    return s


def cast_last(a, b):
    s = 0.0
    for v in (b, a.astype(jnp.bfloat16)):
        h = v.astype(jnp.float32)
        s = s + jnp.dot(h, a)
    return s


def reshaped(a, b):
    s = 0.0
    for v in (a[None], b):
        h = v.reshape(3)
        s = s + jnp.sum(jnp.sin(h))
    return s


def cast_in_place(a, b):
    def one(h):
        h = h.astype(jnp.float32)
        return h.sum()

    return one(a.astype(jnp.bfloat16)) + one(b)


def chosen(a, b):
    def one(v, flag):
        h = jnp.sin(v) if flag else v
        return jnp.sum(h * W)

    return one(a, True) + one(b, False)


def by_method(a, b):
    s = 0.0
    for v in (a[None], b):
        h = jnp.squeeze(v) if v.ndim > 1 else v
        s = s + (h @ a)
    return s


def indexed(a, b):
    s = 0.0
    for v in (a.astype(jnp.bfloat16), b):
        h = v.astype(jnp.float32)
        s = s + h[1] * 2.0
    return s


def negative(a, b):
    s = 0.0
    for v in (a.astype(jnp.bfloat16), b):
        h = v.astype(jnp.float32)
        s += jnp.sum(-h)
    return s


@pytest.mark.parametrize(
    "fun",
    [
        cast,
        cast_last,
        reshaped,
        cast_in_place,
        chosen,
        by_method,
        indexed,
        negative,
        jax.jit(cast),
        lambda a, b: jax.vmap(cast)(a[None], b[None])[0],
    ],
)
def test_a_round_without_an_operation_is_refused(fun):
    address = sg.var("h")
    for asked in (
        sg.capture(fun, address),
        sg.gradients(fun, 1, ys="return", stop_gradients=address),
        sg.edit(fun, {address: lambda h: h * 0}),
    ):
        with pytest.raises(sg.AddressError, match=BEATS):
            asked(W, X)


# -- as before: every round makes an operation, or none of its reads is another array --


def value(fun, *args):
    return sg.capture(fun, sg.var("h"))(*args)[1][sg.var("h")]


def every_round(a, b):
    s = 0.0
    for v in (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)):
        h = v.astype(jnp.float32)
        s = s + jnp.sum(h * h) + jnp.max(h)
    return s


def test_every_round_makes_one():
    rounded = [v.astype(jnp.bfloat16).astype(jnp.float32) for v in (W, X)]
    np.testing.assert_array_equal(value(every_round, W, X), rounded)
    none = sg.gradients(every_round, [0, 1], stop_gradients=sg.var("h"))(W, X)
    assert none == [None, None]


def test_operations_on_other_operands_are_no_sign():
    def f(a, b):
        s = 0.0
        for v in (a, b):
            h = jnp.sin(v)
            s = s + jnp.sum(h * v) + jnp.dot(v, h) + jnp.where(v > 0, h, 0.0).sum()
            like = jnp.zeros_like(h) + v
            s = s + jnp.sum(like) + jnp.sum(jnp.broadcast_to(v.sum(), h.shape))
            for p, q in zip(h, v, strict=True):
                s = s + p * q
            k, u = jnp.meshgrid(h, v)
            s = s + jnp.sum(jax.nn.softmax(h) * jnp.einsum("i,i->i", v, h))
            s = s + jnp.sum(k) + jnp.sum(u)
        return s

    np.testing.assert_allclose(value(f, W, X), [jnp.sin(W), jnp.sin(X)], rtol=1e-6)


def test_a_variable_that_is_assigned_again():
    def f(x):
        h = jnp.sin(x)
        total = jnp.sum(h * h)
        h = x
        return total + jnp.sum(h * h)

    address = sg.var("h", nth=0)
    found = sg.capture(f, address)(X)[1][address]
    np.testing.assert_allclose(found, jnp.sin(X), rtol=1e-6)


def test_a_variable_that_is_assigned_inside_its_own_statement():
    def f(x):
        h = (h := jnp.sin(x)) * 2.0
        return jnp.sum(h * x)

    address = sg.var("h", nth=1)
    found = sg.capture(f, address)(X)[1][address]
    np.testing.assert_allclose(found, jnp.sin(X), rtol=1e-6)


def test_layers_of_which_one_does_nothing():
    """A call on the variable keeps its array where it makes no operation."""

    def f(x):
        layers = (lambda v: jnp.sin(v), lambda v: v, lambda v: jnp.cos(v))
        h = x * 1.0
        for layer in layers:
            h = layer(h)
        return jnp.sum(h * 2.0)

    address = sg.var("h", nth=1)
    found = sg.capture(f, address)(X)[1][address]
    np.testing.assert_allclose(found[-1], jnp.cos(jnp.sin(X)), rtol=1e-6)


def test_a_number_in_another_round_is_no_array():
    def f(x):
        s = 0.0
        for v in (x, 3.0):
            h = v * 2.0
            s = s + jnp.sum(x * h)
        return s

    np.testing.assert_allclose(value(f, X), 2 * X, rtol=1e-6)


def test_a_comprehension_and_a_function_inside_with_the_same_name():
    def f(x):
        h = jnp.sin(x)
        many = [h * 2.0 for h in (x, x)]

        def inner(h):
            return jnp.sum(h * x)

        return jnp.sum(h * many[0]) + inner(x)

    address = sg.var("f.h", line=f.__code__.co_firstlineno + 1)
    found = sg.capture(f, address)(X)[1][address]
    np.testing.assert_allclose(found, jnp.sin(X), rtol=1e-6)


def test_in_the_body_of_a_scan():
    def f(x, w):
        def body(c, u):
            h = c * u
            return jnp.where(h > 0, h, c), jnp.maximum(h, u)

        return jnp.sum(jax.lax.scan(body, x, jnp.stack([w, x]))[1])

    first = X * W
    second = jnp.where(first > 0, first, X) * X
    np.testing.assert_allclose(value(f, X, W), [first, second], rtol=1e-6)


def test_a_partial_of_a_jitted_function():
    inner = jax.jit(functools.partial(lambda w, h: h * w, W))

    def f(x):
        h = jnp.sin(x)
        return jnp.sum(inner(h) + jax.jit(lambda u, v: v * 2.0)(h, x))

    np.testing.assert_allclose(value(f, X), jnp.sin(X), rtol=1e-6)
