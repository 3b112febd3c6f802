"""A stop whose result is not used stops nothing, and is said to."""

import jax
import jax.numpy as jnp
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

W = jnp.ones(3)


def dropped_stop(w, target):
    jax.lax.stop_gradient(target)  # as PyTorch's target.detach_() would
    return jnp.sum((w - target) ** 2)


def dropped_gate(w, target):
    sg.scale_gradient(target, 0.5)
    return jnp.sum((w - target) ** 2)


def dropped_prevention(w, target):
    sg.prevent_gradient(target)
    return jnp.sum((w - target) ** 2)


def dropped_name(w, target):
    sg.name(target, "h")
    return jnp.sum((w - target) ** 2)


def dropped_tree(w, target):
    sg.stop_gradient({"a": target, "b": 2 * target})
    return jnp.sum((w - target) ** 2)


def dropped_in_a_loop(w, target):
    def body(c, _):
        jax.lax.stop_gradient(c)
        return c * 0.5, None

    return jnp.sum((w - jax.lax.scan(body, target, None, length=2)[0]) ** 2)


def dropped_in_jit(w, target):
    @jax.jit
    def difference(w, target):
        jax.lax.stop_gradient(target)
        return w - target

    return jnp.sum(difference(w, target) ** 2)


@pytest.mark.parametrize(
    ("loss", "expression", "does"),
    [
        (dropped_stop, "jax.lax.stop_gradient(target)", "stops"),
        (dropped_gate, "sg.scale_gradient(target, 0.5)", "changes"),
        (dropped_prevention, "sg.prevent_gradient(target)", "prevents"),
        (dropped_name, 'sg.name(target, "h")', "names"),
        (dropped_tree, 'sg.stop_gradient({"a": target, "b": 2 * target})', "stops"),
        (dropped_in_a_loop, "jax.lax.stop_gradient(c)", "stops"),
        (dropped_in_jit, "jax.lax.stop_gradient(target)", "stops"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_has_no_effect_is_said(loss, expression, does):
    flow = sg.flow(loss)(W, W)
    (found,) = flow.dropped
    words = f"its result is not used: it {does} nothing"
    assert (found.site.expr, found.words) == (expression, words)
    assert f"no use   {found.site.place}  {expression}  {words}" in str(flow)
    with pytest.raises(AssertionError, match="expected none") as caught:
        sg.assert_no_gradient(loss, "target")(W, W)
    assert f"{found.site.place}: {expression}: {words}" in str(caught.value)
    assert not flow.cuts


def test_the_margin_shows_it():
    lines = str(sg.flow(dropped_stop)(W, W).source()).splitlines()
    (at,) = [k for k, line in enumerate(lines) if "stop_gradient(target)" in line]
    assert "its result is not used: it stops nothing" in lines[at + 1]


def used(w, target):
    target = jax.lax.stop_gradient(target)
    return jnp.sum((w - target) ** 2)


def partly_used(w, target):
    both = sg.stop_gradient({"a": target, "b": 2 * target})
    return jnp.sum((w - both["a"]) ** 2)


def used_in_one_round(w, target):
    kept = [jax.lax.stop_gradient(target * k) for k in range(3)]
    return jnp.sum((w - kept[0]) ** 2)


def in_a_metric(w, target):
    metric = jnp.mean(jax.lax.stop_gradient(w))
    del metric
    return jnp.sum((w - target) ** 2)


def in_a_library(w, target):
    return jnp.sum(jax.nn.softmax(w) - target) + jnp.sum(
        sg.straight_through(jnp.sign)(w)
    )


@pytest.mark.parametrize(
    "loss",
    [used, partly_used, used_in_one_round, in_a_metric, in_a_library],
    ids=lambda f: f.__name__,
)
def test_what_is_used_is_not_accused(loss):
    flow = sg.flow(loss)(W, W)
    assert flow.dropped == ()
    assert "not used" not in str(flow)
