"""rlax lets a target's gradient into the value network unless it is told not to."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import stopgrad_jax as sg

with warnings.catch_warnings():  # of the libraries that it imports
    warnings.simplefilter("ignore", DeprecationWarning)
    import rlax

FLOATS = jax.ShapeDtypeStruct((3,), jnp.float32)
VALUES = jax.ShapeDtypeStruct((4,), jnp.float32)


def advantage_loss(values, rewards, discounts, stop):
    advantages = rlax.truncated_generalized_advantage_estimation(
        rewards, discounts, 0.95, values, stop_target_gradients=stop
    )
    return jnp.sum(advantages**2)


def default_loss(values, rewards, discounts):
    advantages = rlax.truncated_generalized_advantage_estimation(
        rewards, discounts, 0.95, values
    )
    return jnp.sum(advantages**2)


def test_the_default_leaks_into_the_value_network():
    check = sg.assert_no_gradient(default_loss, "values")
    with pytest.raises(
        AssertionError, match="values: expected none, can get a gradient"
    ):
        check(VALUES, FLOATS, FLOATS)
    flow = sg.flow(default_loss, xs="values")(VALUES, FLOATS, FLOATS)
    assert [i.status for i in flow.inputs] == ["flows", "data", "data"]


def test_the_flag_stops_it_and_the_words_name_the_line():
    sg.assert_no_gradient(advantage_loss, "values")(VALUES, FLOATS, FLOATS, True)
    flow = sg.flow(advantage_loss, xs="values")(VALUES, FLOATS, FLOATS, True)
    (cut,) = flow.cuts
    assert cut.reason == "stop_gradient"
    assert cut.site.expr.startswith("rlax.truncated_generalized_advantage_estimation(")
    first = advantage_loss.__code__.co_firstlineno
    assert cut.site.line == first + 1
    assert cut.site.origin == "library"
    assert "stop_gradient, on purpose" in str(flow.explain("values"))
