"""The flow of an edited function: as if the source read so, and whose stop it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import instructions

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

W = jnp.array([0.4, -0.7, 1.2])
THROUGH = {sg.op("round"): lambda op, x: sg.straight_through(op)(x)}


def loss(w, x):
    h = x * w
    q = jnp.round(h)
    return jnp.sum(q * x)


def by_hand(w, x):
    h = x * w
    q = sg.straight_through(jnp.round)(h)
    return jnp.sum(q * x)


def facts(flow):
    rows = [(row.path, row.status) for row in flow.inputs]
    return rows, [cut.reason for cut in flow.cuts], [s.label for s in flow.steps]


def test_a_straight_through_edit_is_the_one_by_hand():
    edited = sg.flow(sg.edit(loss, THROUGH))(W, W)
    assert facts(edited) == facts(sg.flow(by_hand)(W, W))
    assert not edited.cuts
    (step,) = [step for step in edited.steps if step.kind == "replace"]
    assert step.label == "q"
    assert step.site.expr == "jnp.round(h)"


@pytest.mark.parametrize(
    ("address", "expression"),
    [
        (sg.var("h"), "x * w"),
        (sg.op("mul", nth=0), "x * w"),
        ("w", "jax.lax.stop_gradient(value)"),
    ],
    ids=["var", "op", "argument"],
)
def test_a_stop_of_an_edit_is_named(address, expression):
    def stop(*args):
        value = args[0](*args[1:]) if args[1:] else args[0]
        return jax.lax.stop_gradient(value)

    flow = sg.flow(sg.edit(loss, {address: stop}), xs="w")(W, W)
    (cut,) = [cut for cut in flow.cuts if cut.reason == "stop_gradient"]
    assert cut.words.startswith("stop_gradient, put in by the edit of ")
    assert cut.words in str(flow.explain("w"))
    assert cut.site.expr == expression
    with pytest.raises(AssertionError, match="put in by the edit of"):
        sg.assert_gradient(sg.edit(loss, {address: stop}), "w")(W, W)


def test_a_stop_without_a_line_is_placed_at_its_edit():
    flow = sg.flow(sg.edit(loss, {"w": jax.lax.stop_gradient}), xs="w")(W, W)
    assert "cut at   (edit of w)" in str(flow)
    assert "no source" not in str(flow)


def test_a_stop_of_the_users_own_is_no_edits():
    def stopped(w, x):
        h = jax.lax.stop_gradient(x * w)
        return jnp.sum(h * x)

    flow = sg.flow(sg.edit(stopped, {"x": lambda x: 2.0 * x}), xs="w")(W, W)
    assert [cut.words for cut in flow.cuts] == ["stop_gradient, on purpose"]


def test_the_mark_of_an_edit_costs_nothing(run):
    edited = sg.edit(loss, {sg.var("h"): lambda h: 2.0 * h, **THROUGH})

    def twice(w, x):
        h = 2.0 * (x * w)
        q = sg.straight_through(jnp.round)(h)
        return jnp.sum(q * x)

    assert instructions(edited, W, W) == instructions(twice, W, W)
    grad = lambda f: jax.grad(f)
    assert instructions(grad(edited), W, W) == instructions(grad(twice), W, W)
    expected = run(jax.jacfwd(jax.grad(twice)))(W, W)
    np.testing.assert_array_equal(run(jax.jacfwd(jax.grad(edited)))(W, W), expected)
    many = jnp.stack([W, 2 * W])
    mapped = run(jax.vmap(jax.grad(edited)))(many, many)
    np.testing.assert_array_equal(mapped, run(jax.vmap(jax.grad(twice)))(many, many))
    sg.check_gradients(sg.edit(by_hand, {"x": lambda x: x * 1.5}))(W, W)
