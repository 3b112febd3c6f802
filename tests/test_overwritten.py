"""Arrays that are written in parts, asked about between the writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X = f32(0.3, -0.7, 1.1)


def filled(x):
    h = jnp.zeros((2, 3))
    h = lax.dynamic_update_slice(h, x[None], (0, 0))
    h = lax.dynamic_update_slice(h, jnp.sin(x)[None], (1, 0))
    return jnp.sum(h**2)


def replaced(x):
    h = x.at[0].set(5.0)
    k = h.at[0].set(1.0)
    return jnp.sum(k**2)


def thrown_away(x):
    h = x.at[0].set(5.0)
    k = h.at[:].set(1.0)
    return jnp.sum(k**2)


BETWEEN = {
    "a buffer, half full": (filled, sg.var("h", nth=1), [[0.6, -1.4, 2.2], [0, 0, 0]]),
    "a buffer, full": (filled, sg.var("h", nth=2), np.stack([2 * X, 2 * np.sin(X)])),
    "one entry is replaced": (replaced, sg.var("h"), [0.0, -1.4, 2.2]),
    "the last": (replaced, sg.var("k"), [2.0, -1.4, 2.2]),
    "by its operation": (replaced, sg.op("scatter", nth=0), [0.0, -1.4, 2.2]),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_an_array_between_two_writes_gets_the_gradient_of_what_is_left(case):
    fun, address, right = BETWEEN[case]
    np.testing.assert_allclose(sg.gradients(fun, address)(X), right, rtol=1e-6)
    assert sg.flow(fun)(X).connected(address) is True
    sg.assert_gradient(fun, address, args=(X,))
    (stats,) = sg.gradient_stats(fun, address)(X).values()
    np.testing.assert_allclose(stats.norm, np.linalg.norm(right), rtol=1e-6)


def test_what_is_replaced_as_a_whole_has_none():
    assert sg.gradients(thrown_away, sg.var("h"))(X) is None
    sg.assert_no_gradient(thrown_away, sg.var("h"), args=(X,))


@pytest.mark.parametrize("fun", [filled, replaced])
def test_a_stop_between_two_writes_stops(fun):
    """In `filled` the second write brings x in again, after the stop."""
    address = sg.var("h", nth=1) if fun is filled else sg.var("h")
    grad = sg.gradients(fun, "x", stop_gradients=address)(X)
    if fun is filled:  # d sum(sin(x)**2)
        np.testing.assert_allclose(grad, jnp.sin(2 * X), rtol=1e-6)
    else:
        assert grad is None


def test_what_an_array_held_before_is_gone_whether_or_not_the_next_is_asked_about():
    def f(x, w):
        h = x.at[0].set(w)
        k = h.at[0].set(1.0)
        return jnp.sum(k**2)

    assert sg.gradients(f, "w")(X, 2.0) is None
    w, k = sg.gradients(f, ["w", sg.var("k")])(X, 2.0)
    assert w is None
    np.testing.assert_allclose(k, [2.0, -1.4, 2.2], rtol=1e-6)


@pytest.mark.parametrize("count", [64, 65, 66])
@pytest.mark.parametrize("last", [True, False])
def test_buffers_that_are_written_many_times(count, last):
    """Only some writes hold x: the first ones, or the last ones."""

    def f(x):
        h = jnp.zeros(70)
        for k in range(count):
            by_x = k >= count - 3 if last else k < 3
            h = h.at[k].set(x[k % 3] * 2.0 if by_x else 1.0)
        return jnp.sum(h)

    np.testing.assert_array_equal(sg.gradients(f, "x")(X), jax.grad(f)(X))
    assert sg.flow(f)(X).inputs[0].status == "flows"
    sg.assert_gradient(f, "x", args=(X,))
