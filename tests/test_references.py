"""Gradients through mutable references: `jax.new_ref`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = jnp.float32([0.4, -0.7, 1.2])


def through_a_reference(x):
    ref = jax.new_ref(x * 2.0)
    ref[0] += 1.0
    return jnp.sum(ref[...] ** 2)


def in_a_loop(x):
    ref = jax.new_ref(jnp.zeros(3))

    def body(i, c):
        ref[i] = c
        return c * 2.0

    jax.lax.fori_loop(0, 3, body, x[0])
    return jnp.sum(ref[...])


def in_a_branch(x):
    ref = jax.new_ref(jnp.zeros(()))

    def yes(x):
        ref[...] = x

    jax.lax.cond(True, yes, lambda x: None, x[1])
    return ref[...]


def written_stopped(x):
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] = jax.lax.stop_gradient(x)
    return jnp.sum(ref[...] * 3.0)


def all_of_it_replaced(x):
    ref = jax.new_ref(x)
    ref[...] = jnp.ones(3)
    return jnp.sum(ref[...])


def stopped_in_a_loop(x):
    ref = jax.new_ref(jnp.zeros(3))

    def body(i, c):
        ref[i] = jax.lax.stop_gradient(c)
        return c * 2.0

    jax.lax.fori_loop(0, 3, body, x[0])
    return jnp.sum(ref[...])


def of_integers(x):
    ref = jax.new_ref(jnp.zeros(3, int))
    ref[...] = x.astype(int)
    return jnp.sum(ref[...].astype(float))


@pytest.mark.parametrize(
    "f",
    [
        through_a_reference,
        in_a_loop,
        in_a_branch,
        written_stopped,
        all_of_it_replaced,
        stopped_in_a_loop,
        of_integers,
    ],
    ids=lambda f: f.__name__,
)
def test_references(f):
    (row,) = sg.flow(f)(X).inputs
    try:
        gradient = jax.grad(f)(X)
    except AttributeError:  # JAX 0.10 fails where nothing comes back to a reference
        assert jax.__version_info__ < (0, 11)
        assert jax.jvp(f, (X,), (jnp.float32([1.0, 3.0, 7.0]),))[1] == 0
        assert row.status != "flows"
        return
    assert (row.status == "flows") == bool(jnp.any(gradient != 0))
    assert row.status != "unknown"
    check = sg.assert_gradient if jnp.any(gradient != 0) else sg.assert_no_gradient
    check(f, "x")(X)
    found = sg.gradients(f, "x", unconnected_gradients="zero")(X)
    np.testing.assert_array_equal(found, gradient)


def test_a_reference_that_a_while_loop_writes_is_differentiated_by_jax_in_any_case():
    """Also where nothing moves that it holds: then `jax.grad` raises."""

    def f(x, w):
        held = jax.new_ref(x)

        def body(k):
            held[...] = held[...] * 2.0
            return k + 1

        jax.lax.while_loop(lambda k: k < 3, body, 0)
        return jnp.sum(held[...] * w)

    x, w = jnp.arange(1.0, 4.0), jnp.ones(3)
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(f, 1)(x, w)
    flow = sg.flow(f, xs="w")(x, w)
    assert flow.inputs[0].status == "unknown"
    for check in (sg.assert_gradient, sg.assert_no_gradient):
        with pytest.raises(AssertionError, match=r"jax\.grad raises"):
            check(f, "w")(x, w)

    def jitted(x, w):  # nothing moves that it is given, so it works
        return jnp.sum(jax.jit(lambda x: f(x, jnp.ones(3)))(x) * w)

    assert np.all(jax.grad(jitted, 1)(x, w) == 48.0)
    assert sg.flow(jitted, xs="w")(x, w).inputs[0].status == "flows"
    sg.assert_gradient(jitted, "w")(x, w)


def read_by_a_condition(x):
    """A while loop whose condition, and no round, reads a reference."""
    ref = jax.new_ref(x)
    goes_on = lambda carry: carry[0] < ref[...]
    step = lambda carry: (carry[0] + 1.0, carry[1] * 2.0)
    rounds = jax.lax.while_loop(goes_on, step, (0.0, 1.0))
    return jax.lax.stop_gradient(rounds[1]) * ref[...]


def test_a_reference_that_a_condition_reads_is_what_it_was():
    """At 2.5 there are three rounds: 8 x, and the loop itself is behind the stop."""
    assert jax.grad(read_by_a_condition)(2.5) == 8.0
    assert sg.gradients(read_by_a_condition, 0)(2.5) == 8.0
    (row,) = sg.flow(read_by_a_condition)(2.5).inputs
    assert row.status == "flows"
