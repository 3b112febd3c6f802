"""A constant that decides a selection does so in every spelling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X, W = f32(0.3, -0.7, 1.2), f32(1.1, 0.4, -0.9)
lax = jax.lax
first, second = (lambda a, b: a), (lambda a, b: b)


def jitted(function, *first):
    """The function called under `jax.jit`, with these constants handed in."""
    return lambda *args: jax.jit(function)(*first, *args)


# Each is w, and nothing of x, whatever these are.
ALWAYS_W = {
    "select": lambda x, w: lax.select(True, w, x),
    "where not": jitted(lambda d, x, w: jnp.where(~d, x, w), True),
    "where True": lambda x, w: jnp.where(True, w, x),
    "where False": lambda x, w: jnp.where(False, x, w),
    "where one": lambda x, w: jnp.where(1, w, x),
    "where an array": lambda x, w: jnp.where(jnp.array(False), x, w),
    "where of more": lambda x, w: jnp.where(True, w, x[:, None])[0],
    "filled": lambda x, w: lax.select(jnp.broadcast_to(True, (3,)), w, x),
    "full": lambda x, w: lax.select(jnp.full((3,), False), x, w),
    "jit select": jitted(lambda d, x, w: lax.select(d, w, x), True),
    "jit where": jitted(lambda d, x, w: jnp.where(d, w, x), True),
    "jit of jit": jitted(jitted(lambda d, x, w: jnp.where(d, w, x), True)),
    "inside": jitted(
        lambda d, x, w: jax.jit(lambda x, w, d: jnp.where(d, w, x))(x, w, d), True
    ),
    "checkpoint": lambda x, w: jax.checkpoint(lambda d, x, w: jnp.where(d, w, x))(
        True, x, w
    ),
    "in a loop": lambda x, w: lax.scan(
        lambda c, v: (c, jnp.where(True, *v)), 0.0, (w, x)
    )[1],
    "in a branch": lambda x, w: lax.cond(
        w[0] > 0, lambda: jnp.where(True, w, x), lambda: 2 * w
    ),
    "compared numbers": jitted(lambda d, x, w: jnp.where(d > 0, w, x), 0.5),
    "a difference": jitted(lambda d, x, w: jnp.where(3.0 - d > 2.5, x, w), 0.5),
    "an infinity": jitted(lambda d, x, w: jnp.where(d - d == 0, x, w), jnp.inf),
    "an integer as a number": jitted(
        lambda d, x, w: jnp.where(d.astype(float) >= 1, w, x), 1
    ),
    "both ways": lambda x, w: jnp.where(True, jnp.where(False, x, w), x),
}


@pytest.mark.parametrize("spelling", ALWAYS_W)
def test_a_constant_decides(spelling):
    def fun(x, w):
        return jnp.sum(ALWAYS_W[spelling](x * 2, w * 2) ** 2)

    by_x, by_w = jax.grad(fun, (0, 1))(X, W)
    assert not np.any(by_x)
    assert np.all(by_w)
    flow = sg.flow(fun)(X, W)
    assert [row.status for row in flow.inputs] == ["unused", "flows"]
    sg.assert_no_gradient(fun, "x")(X, W)
    sg.assert_gradient(fun, "w")(X, W)
    with pytest.raises(AssertionError):
        sg.assert_gradient(fun, "x")(X, W)
    for run in (lambda f: f, jax.jit):
        value, (none, grad) = run(sg.value_and_gradients(fun, ["x", "w"]))(X, W)
        assert none is None
        np.testing.assert_allclose(grad, by_w, rtol=1e-6)
        np.testing.assert_allclose(value, fun(X, W), rtol=1e-6)
    zeros = sg.gradients(fun, "x", unconnected_gradients="zero")(X, W)
    np.testing.assert_array_equal(zeros, by_x)
    assert "may be zero" not in str(flow.explain("w")) or spelling == "in a branch"


def counted(d, x, w):
    """A loop that begins with a constant, which is another one in the next round."""

    def step(carry, _):
        d, total = carry
        return (~d, total + jnp.where(d, w, x)), None

    return lax.scan(step, (d, 0 * x), None, length=2)[0][1]


def switched(k, x, w):
    def step(carry, _):
        k, total = carry
        return (k + 1, total + lax.switch(k, [lambda: w, lambda: x])), None

    return lax.scan(step, (k, 0 * x), None, length=2)[0][1]


def fori(d, x, w):
    return lax.fori_loop(
        0, 2, lambda k, total: total + lax.select(k == d, w, x), jnp.zeros_like(x)
    )


# Each depends on both.
BOTH = {
    "carried": functools.partial(counted, True),
    "carried, jitted": jitted(counted, True),
    "switched": functools.partial(switched, 0),
    "switched, jitted": jitted(switched, 0),
    "counter": functools.partial(fori, 0),
    "by value": lambda x, w: jnp.where(x > 0, w, x),
    "several": lambda x, w: lax.select(jnp.array([True, False, True]), w, x),
    "two calls": lambda x, w: jnp.where(True, w, x) + jnp.where(False, w, x),
    "two branches": lambda x, w: (
        lax.cond(True, second, first, x, w) + lax.cond(False, second, first, x, w)
    ),
    "handed in": lambda x, w: jax.jit(lambda d, x, w: jnp.where(d, w, x))(x > 0, x, w),
    "computed": lambda x, w: jnp.where(jnp.sum(x) > 0, w, x),
    "a number carried": lambda x, w: lax.fori_loop(
        0,
        2,
        lambda k, c: (c[0] + 1.0, c[1] + jnp.where(c[0] < 0.5, w, x)),
        (0.0, 0 * x),
    )[1],
}


@pytest.mark.parametrize("spelling", BOTH)
def test_what_is_no_constant_decides_nothing(spelling):
    fun = lambda x, w: jnp.sum(BOTH[spelling](x, w))
    flow = sg.flow(fun)(X, W)
    assert [row.status for row in flow.inputs] == ["flows", "flows"]
    both = jax.jvp(fun, (X, W), (jnp.ones(3), jnp.zeros(3)))[1]
    assert both != 0 or spelling == "computed"


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, w: lax.cond(True, second, first, x, w),
        lambda x, w: lax.switch(1, [first, second], x, w),
        jitted(lambda d, x, w: lax.cond(d, second, first, x, w), True),
    ],
    ids=["cond", "switch", "jit"],
)
def test_the_branch_that_is_not_taken_gets_zeros_as_in_tensorflow(fun):
    loss = lambda x, w: jnp.sum(fun(x, w))
    by_x, by_w = sg.gradients(loss, ["x", "w"])(X, W)
    np.testing.assert_array_equal(by_x, jnp.zeros(3))
    np.testing.assert_array_equal(by_w, jnp.ones(3))
    assert "may be zero at some inputs: " in str(sg.flow(loss)(X, W).explain("x"))


def test_names_in_the_branch_that_is_not_taken():
    def fun(x, w):
        yes = lambda: sg.name(w * 2, "yes")
        return jnp.sum(lax.cond(True, yes, lambda: sg.name(x * 2, "no")))

    no, yes = sg.gradients(fun, ["no", "yes"])(X, W)
    np.testing.assert_array_equal(no, jnp.zeros(3))
    np.testing.assert_array_equal(yes, jnp.ones(3))
    edited = sg.edit(fun, {"no": lambda h: h * 5, "yes": lambda h: h * 3})
    np.testing.assert_allclose(edited(X, W), 6 * jnp.sum(W), rtol=1e-6)


def test_references_are_written_in_any_branch():
    def fun(x, w):
        def body(w, x):
            ref = jax.new_ref(w)

            def no():
                ref[...] = x

            lax.cond(False, no, lambda: None)
            return ref[...]

        return jnp.sum(body(w, x))

    assert sg.flow(fun, xs="w")(X, W).inputs[0].status == "flows"


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("f", [jnp.var, jnp.std], ids=lambda f: f.__name__)
def test_a_variance_selects_nothing_by_what_it_is_of(f, ddof):
    """Its comparison is of the number of entries and of `ddof`."""
    fun = lambda x, w: jnp.sum(f(x * w, ddof=ddof))
    assert np.all(jax.grad(fun)(X, W))
    assert "can get a gradient." in str(sg.flow(fun)(X, W).explain("x"))
