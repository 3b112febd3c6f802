"""Values inside that no argument feeds, or that reach the result in a later round."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X, W = f32(0.3, -0.7, 1.2), f32(1.0, 2.0, 3.0)
ZERO = f32(0.0, 0.0, 0.0)
CONNECTED = re.compile("can get a gradient|connected; may be zero")


def scanned(step, *start):
    """A scan over three rows whose result is what its steps hand out."""
    start = start or (ZERO,)
    return lambda x, named: jnp.sum(
        lax.scan(lambda c, e: step(c, x, lambda h: named(h, e)), start, jnp.arange(3))[
            1
        ]
    )


def looped(x, named):
    def body(k, c):
        old, new = c
        h = named(jnp.tanh(x * (k + 1)), k)
        return old * 0.5 + new, h

    return jnp.sum(lax.fori_loop(0, 3, body, (ZERO, ZERO))[0])


def in_reference(x, named):
    held = jax.new_ref(ZERO)

    def step(c, k):
        old = held[...]
        held[...] = named(jnp.sin(x), k)
        return c + old, None

    return jnp.sum(lax.scan(step, ZERO, jnp.arange(3))[0])


# Each reaches the result through what the loop carries, and not in its own round; and
# what is carried in at first does not move.
CARRIED = {
    "decay": scanned(lambda c, x, h: ((c[0] * 0.5 + h(jnp.tanh(x)),), c[0])),
    "recurrent": scanned(lambda c, x, h: ((h(jnp.tanh(c[0] + x)),), jnp.sin(c[0]))),
    "swapped": scanned(
        lambda c, x, h: ((c[1] * 2, h(jnp.sin(x)) + c[0]), c[0]), ZERO, ZERO
    ),
    "remat": scanned(
        lambda c, x, h: jax.checkpoint(
            lambda c: ((c[0] * 0.5 + h(jnp.tanh(x)),), c[0])
        )(c)
    ),
    "cond": scanned(
        lambda c, x, h: lax.cond(
            x[2] > 0,
            lambda c: ((c[0] * 0.5 + h(jnp.tanh(x)),), c[0]),
            lambda c: (c, c[0]),
            c,
        )
    ),
    "nested": scanned(
        lambda c, x, h: (
            (
                c[0]
                + lax.scan(lambda d, _: (d + h(jnp.sin(x)), d), ZERO, length=2)[1][1],
            ),
            c[0],
        )
    ),
    "fori_loop": looped,
    "reference": in_reference,
}


def hand_made(f, x):
    """Differentiate by what is added by hand to the value in each of the rounds."""
    return jax.grad(lambda e: f(x, lambda h, k: h + e[k]))(jnp.zeros((3, 3)))


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("name", CARRIED)
def test_in_a_later_round(name, around):
    f = CARRIED[name]
    expected = hand_made(f, X)
    assert np.any(expected != 0)
    loss = around(lambda x: f(x, lambda h, k: sg.name(h, "h")))
    (row,) = sg.flow(loss, xs="h")(X).inputs[:1]
    assert (row.path, row.status) == ("h", "flows")
    flow = sg.flow(loss)(X)
    assert flow.connected("h")
    assert CONNECTED.search(str(flow.explain("h")))
    sg.assert_gradient(loss, "h")(X)
    with pytest.raises(AssertionError):
        sg.assert_no_gradient(loss, "h")(X)
    if name != "nested":  # there is one for each round of both loops
        found = sg.gradients(loss, "h")(X)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sin", "double", "round"])
def test_and_where_it_is_cut_the_cause_is_the_cut(name):
    """Not the rules of what is before it."""
    before = {"sin": jnp.sin, "double": lambda c: c * 2, "round": lambda c: c}[name]
    cut = jnp.round if name == "round" else lax.stop_gradient

    def loss(x):
        def step(c, _):
            h = sg.name(jnp.tanh(c + x), "h")
            return h, cut(before(c))

        return jnp.sum(lax.scan(step, ZERO, length=3)[1])

    flow = sg.flow(loss, xs="h")(X)
    assert flow.inputs[0].status == "cut"
    assert len(flow.cuts) == 1
    word = "round" if name == "round" else "stop_gradient"
    with pytest.raises(ValueError, match=rf"got: +h: .*{word}"):
        sg.gradients(loss, "h", unconnected_gradients="error")(X)
    sg.assert_no_gradient(loss, "h")(X)


# Values that no argument feeds --------------------------------------------------------


def closed(x, target):
    teacher = sg.name(W * 1.0, "h")
    return jnp.sum((x * teacher - lax.stop_gradient(target)) ** 2)


def noise(x, target):
    h = sg.name(jax.random.normal(jax.random.key(0), (3,)), "h")
    return jnp.sum(x * h * target)


def constant(x, target):
    h = jnp.ones(3)
    return jnp.sum(x * h * target)


def jitted(x, target):
    inner = jax.jit(lambda w: sg.name(jnp.sin(w), "h"))
    return jnp.sum(x * inner(W) * target)


def branch(x, target):
    h = lax.cond(x[0] > 0, lambda: sg.name(W * 2, "h"), lambda: W)
    return jnp.sum(h * x * target)


def named_weights(x, target):
    return jnp.sum(sg.name(W, "h") * x * target)


UNFED = [closed, noise, constant, jitted, branch, named_weights]


@pytest.mark.parametrize("f", UNFED, ids=lambda f: f.__name__)
def test_a_value_that_no_argument_feeds(f):
    h = sg.var("h") if f is constant else "h"
    target = f32(0.4, 1.5, -2.0)
    (gradient,) = sg.gradients(f, [h])(X, target)
    assert np.all(gradient != 0)
    for xs in (h, [h], ["x", "target", h]):
        flow = sg.flow(f, xs=xs)(X, target)
        assert {row.path: row.status for row in flow.inputs}["h"] == "flows"
    flow = sg.flow(f)(X, target)
    assert flow.connected(h)
    assert CONNECTED.search(str(flow.explain(h)))
    assert flow.focus(h).alt
    assert "<svg" in flow.focus(h).to_svg()
    sg.assert_gradient(f, h)(X, target)
    with pytest.raises(AssertionError, match="h: expected none"):
        sg.assert_no_gradient(f, h)(X, target)
    stopped = lambda x, target: lax.stop_gradient(f(x, target))
    assert sg.gradients(stopped, "h" if f is not constant else h)(X, target) is None


def test_one_leaf_of_a_tree_that_no_argument_feeds():
    def f(x):
        t = sg.name({"w": W * 1.0, "b": jnp.sin(x)}, "t")
        return jnp.sum(t["w"] * lax.stop_gradient(t["b"]))

    flow = sg.flow(f, xs="t")(X)
    status = {row.path: row.status for row in flow.inputs}
    assert status["t/w"] == "flows"
    assert status["t/b"] == "cut"
    assert "┃ t (" in str(flow.explain("t/w"))  # it is a step of the whole tree
    with pytest.raises(AssertionError, match="t/w: expected none"):
        sg.assert_no_gradient(f, "t")(X)


def test_a_function_without_arguments():
    def f():
        return jnp.sum(sg.name(W, "h") ** 2)

    assert sg.flow(f, xs="h")().inputs[0].status == "flows"
    sg.assert_gradient(f, "h")()
    np.testing.assert_array_equal(sg.gradients(f, "h")(), 2 * W)


def test_integers_that_nothing_feeds_are_data():
    def f(x):
        return jnp.sum(x * sg.name(jnp.arange(3), "h"))

    flow = sg.flow(f, xs=["x", "h"])(X)
    status = {row.path: row.status for row in flow.inputs}
    assert status == {"x": "flows", "h": "data"}
