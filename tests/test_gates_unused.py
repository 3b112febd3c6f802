"""Gates of several arrays of which some get no gradient, or give none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)
ONES, ZEROS = np.ones(3), np.zeros(3)


def doubled(tree):
    return sg.transform_gradient(tree, lambda c: jax.tree.map(lambda x: 2 * x, c))


# One of two arrays is used: the other's cotangent is zero, not missing ----------------

GATES = {
    "clip_gradient_norm": (lambda p: sg.clip_gradient_norm(p, 1.0), 3**-0.5),
    "transform_gradient": (doubled, 2.0),
    "by optax": (lambda p: sg.transform_gradient(p, optax.scale(-3.0)), -3.0),
    "scale_gradient": (lambda p: sg.scale_gradient(p, 0.5), 0.5),
}
WAYS = {
    "as it is": lambda f: jax.grad(f),
    "jit": lambda f: jax.jit(jax.grad(f)),
    "vmap": lambda f: (
        lambda p: jax.tree.map(
            lambda x: x[0],
            jax.vmap(jax.grad(f))(jax.tree.map(lambda x: jnp.stack([x, x]), p)),
        )
    ),
    "remat": lambda f: jax.grad(jax.checkpoint(f)),
    "gradients": lambda f: sg.gradients(f, "p"),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_an_array_that_is_not_used_counts_as_zero(gate, way):
    function, slope = GATES[gate]

    def loss(p):
        return jnp.sum(function(p)["a"])

    grads = WAYS[way](loss)({"a": W, "b": X})
    np.testing.assert_allclose(grads["a"], slope * ONES, rtol=1e-6)
    np.testing.assert_array_equal(ZEROS if grads["b"] is None else grads["b"], ZEROS)


@pytest.mark.parametrize("which", [0, 1])
def test_a_backward_of_two_results_of_which_one_is_used(which):
    both = sg.with_backward(
        lambda a: (jnp.sin(a), jnp.cos(a)), lambda ct, out, a: (ct[0] + 2 * ct[1],)
    )

    def loss(a):
        return jnp.sum(both(a)[which])

    np.testing.assert_array_equal(jax.grad(loss)(W), (1 + which) * ONES)
    np.testing.assert_array_equal(sg.gradients(loss, "a")(W), (1 + which) * ONES)


def test_the_transpose_of_a_gate_of_two_arrays():
    transposed = jax.linear_transpose(lambda p: doubled(p)["a"], {"a": W, "b": X})
    (back,) = transposed(W)
    np.testing.assert_allclose(back["a"], 2 * W, rtol=1e-6)
    np.testing.assert_array_equal(back["b"], ZEROS)


# What a rule gives back is zero, whatever comes ---------------------------------------


def by_zeros(a, b):
    rule = lambda ct, out, a, b: (jnp.zeros_like(ct), ct)
    return jnp.sum(sg.with_backward(lambda a, b: a * b, rule)(a, b))


def by_none(a, b):
    rule = lambda ct, out, a, b: (None, ct)
    return jnp.sum(sg.with_backward(lambda a, b: a * b, rule)(a, b))


def transformed(a, b):
    return jnp.sum(sg.transform_gradient(a, jnp.zeros_like) + b)


def transformed_in_part(a, b):
    rule = lambda cts: (jnp.zeros_like(cts[0]), cts[1])
    return sum(jnp.sum(x) for x in sg.transform_gradient((a, b), rule))


BACKWARD = "the backward function returns None or zeros for it"
TRANSFORM = "the function given to transform_gradient returns zeros for it"
ZERO_RULES = {
    by_zeros: BACKWARD,
    by_none: BACKWARD,
    transformed: TRANSFORM,
    transformed_in_part: TRANSFORM,
}


@pytest.mark.parametrize("fun", ZERO_RULES, ids=lambda f: f.__name__)
def test_a_rule_that_returns_zeros_cuts(fun):
    np.testing.assert_array_equal(jax.grad(fun)(W, X), ZEROS)
    flow = sg.flow(fun)(W, X)
    assert [row.status for row in flow.inputs] == ["cut", "flows"]
    assert ZERO_RULES[fun] in str(flow.explain("a"))
    a, b = sg.gradients(fun, ["a", "b"])(W, X)
    assert a is None
    np.testing.assert_array_equal(b, ONES)
    sg.assert_no_gradient(fun, "a", args=(W, X))
    with pytest.raises(AssertionError, match="a: expected a gradient"):
        sg.assert_gradient(fun, "a", args=(W, X))


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_what_is_zero_by_a_value_flows(factor):
    """A factor is an ordinary value, as in `x * 0`."""
    flow = sg.flow(lambda a: jnp.sum(sg.scale_gradient(a, factor)))(W)
    assert flow.inputs[0].status == "flows"
