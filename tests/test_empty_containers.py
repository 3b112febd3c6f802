"""A container of nothing is a place in a tree, and no leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import assert_same_bits, f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("standard_promotion")
EMPTY = {
    "tuple": (),
    "dict": {},
    "list": [],
    "EmptyState": optax.EmptyState(),
    "MaskedNode": optax.MaskedNode(),
    "None": None,
    "nested": {"a": (), "b": [{}, None]},
}


@pytest.fixture(params=EMPTY.values(), ids=EMPTY)
def empty(request):
    return request.param


def params(empty):
    enc, body, head = f32(1.0, 2.0, 3.0), f32(7.0), f32(0.5, -4.0)
    return {"body": body, "drop": empty, "enc": enc, "head": head}


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(assert_same_bits, got, expected)


def alone(optimizer, gradients):
    """What the optimizer does where the head is all there is."""
    head = params(None)["head"]
    return optimizer.update(gradients["head"], optimizer.init(head), head)[0]


INSIDE = {
    "alone": lambda tx, p: tx,
    "chain": lambda tx, p: optax.chain(tx, optax.identity()),
    "multi_transform": lambda tx, p: optax.multi_transform(
        {"tuned": tx, "rest": optax.sgd(1.0)}, jax.tree.map(lambda _: "tuned", p)
    ),
    "partition": lambda tx, p: optax.partition(
        {"tuned": tx, "rest": optax.sgd(1.0)}, jax.tree.map(lambda _: "tuned", p)
    ),
    "masked": lambda tx, p: optax.masked(tx, jax.tree.map(lambda _: True, p)),
    "freeze": lambda tx, p: sg.freeze(tx, "body"),
}


@pytest.mark.parametrize("around", INSIDE.values(), ids=INSIDE)
def test_freeze_leaves_an_empty_container_where_it_is(empty, around):
    p = params(empty)
    gradients = jax.tree.map(lambda x: x + 1, p)
    tx = around(sg.freeze(optax.adam(0.1), "enc"), p)
    updates, _ = tx.update(gradients, tx.init(p), p)
    assert jax.tree.structure(updates) == jax.tree.structure(p)
    assert_same_bits(updates["head"], alone(optax.adam(0.1), gradients))
    assert_same_bits(optax.apply_updates(p, updates)["enc"], p["enc"])


def test_freeze_takes_stax_parameters():
    p = [(f32(1.0, 2.0),), (), (f32(3.0),), ()]
    tx = sg.freeze(optax.sgd(0.5), "0")
    updates, _ = tx.update(p, tx.init(p), p)
    same(optax.apply_updates(p, updates), [p[0], (), (f32(1.5),), ()])


def test_freeze_hands_an_empty_container_on_to_a_line_search(empty):
    p = params(empty)

    def loss(p):
        return jnp.sum((p["head"] - 1.0) ** 2) + jnp.sum(p["enc"])

    tx = sg.freeze(optax.lbfgs(), "enc")
    value, grad = jax.value_and_grad(loss)(p)
    updates, _ = tx.update(grad, tx.init(p), p, value=value, grad=grad, value_fn=loss)
    new = optax.apply_updates(p, updates)
    assert loss(new) < value
    assert_same_bits(new["enc"], p["enc"])


def test_freeze_refuses_a_gradient_where_nothing_is(empty):
    p = params(empty)
    tx = sg.freeze(optax.sgd(0.1), "enc")
    with pytest.raises(ValueError, match=r"structure of params[\s\S]*write: jax\.grad"):
        tx.update({**p, "drop": f32(1.0)}, tx.init(p), p)


def test_a_training_step_freezes_beside_an_empty_container(empty):
    p = {**params(empty), "head": {"a": f32(2.0), "b": f32(3.0)}}

    def loss(p, x):
        return (
            jnp.sum(p["head"]["a"] * x + p["head"]["b"])
            + jnp.sum(p["enc"])
            + p["body"][0]
        )

    tx = sg.freeze(optax.sgd(0.5), ["enc", "body"])
    step = sg.train.make_step(loss, tx, frozen="head/b")
    state, _ = step(step.init(p), f32(4.0))
    expected = {**p, "head": {"a": f32(2.0 - 0.5 * 4.0), "b": f32(3.0)}}
    same(state.params, expected)


# A backward pass of one's own -------------------------------------------------------


def test_a_backward_pass_returns_an_empty_container_as_it_is(empty):
    f = sg.with_backward(lambda p, s: p**2, lambda ct, out, p, s: (ct * 2 * p, s))
    assert jax.grad(f)(3.0, empty) == 6.0


def test_a_backward_pass_returns_an_argument_that_holds_one(empty):
    f = sg.with_backward(
        lambda p: p["x"] * p["y"],
        lambda ct, out, p: ({"x": ct * p["y"], "s": empty, "y": ct * p["x"]},),
    )
    got = jax.grad(lambda x, y: f({"x": x, "s": empty, "y": y}), (0, 1))(2.0, 3.0)
    assert got == (3.0, 2.0)


def test_a_backward_pass_may_keep_what_carries_no_gradient():
    f = sg.with_backward(
        lambda s: jnp.sum(s["w"] ** 2),
        lambda ct, out, s: (dict(s, n=None, w=ct * s["w"] * 2),),
    )
    got = jax.grad(lambda w: f({"cfg": (), "n": 3, "w": w}))(f32(1.0, -2.0))
    np.testing.assert_array_equal(got, [2.0, -4.0])


def test_a_cotangent_where_nothing_is_raises(empty):
    f = sg.with_backward(lambda p, s: p**2, lambda ct, out, p, s: (ct * 2 * p, ct))
    with pytest.raises(TypeError, match=r"cotangent of argument 1 is a tree like it"):
        jax.grad(f)(3.0, empty)


@pytest.mark.parametrize("given", [(), {}, []], ids=["tuple", "dict", "list"])
def test_an_empty_container_is_no_cotangent_of_an_array(given):
    f = sg.with_backward(lambda p, q: p * q, lambda ct, out, p, q: (ct * q, given))
    with pytest.raises(TypeError) as caught:
        jax.grad(f)(3.0, 2.0)
    message = str(caught.value)
    assert "argument 1" in message
    assert repr(given) in message
    assert "f32[0]" not in message
