"""No gate adds an instruction that hand-written JAX would not have."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from programs import f32, instructions, primitives

import stopgrad_jax as sg


def by_hand(pull):
    """Write the gate as a custom_vjp, as users do today."""

    @jax.custom_vjp
    def gate(x, p):
        return x

    gate.defvjp(lambda x, p: (x, p), lambda p, ct: (pull(ct, p), None))
    return gate


def _norm(ct, p):
    square = jnp.maximum(jnp.sum(ct * ct), jnp.finfo(jnp.float32).tiny)
    return ct * jnp.minimum(1.0, p / jnp.sqrt(square))


def _optax(ct, p):
    return optax.clip_by_global_norm(1.0).update(ct, optax.EmptyState())[0]


@jax.custom_vjp
def _rounded(x):
    return jnp.round(x)


_rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))
_hand_stopped = lambda x, p: lax.stop_gradient(x) + x
_backward = lambda ct, out, x: (ct,)

PAIRS = {
    "stop": (lambda x, p: sg.stop_gradient(x) + x, _hand_stopped),
    "scale": (sg.scale_gradient, by_hand(lambda ct, p: ct * p)),
    "reverse": (lambda x, p: sg.reverse_gradient(x), by_hand(lambda ct, p: -ct)),
    "reverse, scaled": (sg.reverse_gradient, by_hand(lambda ct, p: -p * ct)),
    "mask": (
        lambda x, p: sg.mask_gradient(x, p > 0.2),
        lambda x, p: by_hand(lambda ct, m: jnp.where(m, ct, 0.0))(x, p > 0.2),
    ),
    "clip": (
        lambda x, p: sg.clip_gradient(x, -p, p),
        by_hand(lambda ct, p: jnp.clip(ct, -p, p)),
    ),
    "clip, above": (
        lambda x, p: sg.clip_gradient(x, None, p),
        by_hand(lambda ct, p: jnp.minimum(ct, p)),
    ),
    "norm": (sg.clip_gradient_norm, by_hand(_norm)),
    "optax": (
        lambda x, p: sg.transform_gradient(x, optax.clip_by_global_norm(1.0)),
        by_hand(_optax),
    ),
    "function": (
        lambda x, p: sg.transform_gradient(x, lambda ct: ct * p),
        by_hand(lambda ct, p: ct * p),
    ),
    "nonfinite": (
        sg.replace_nonfinite_gradient,
        by_hand(lambda ct, p: jnp.where(jnp.isfinite(ct), ct, p)),
    ),
    "prevent": (
        lambda x, p: x + lax.stop_gradient(sg.prevent_gradient(x)),
        _hand_stopped,
    ),
    "straight_through": (
        lambda x, p: sg.straight_through(jnp.round)(x),
        lambda x, p: _rounded(x),
    ),
    "replace_value": (
        lambda x, p: sg.replace_value(x, jnp.round(x)),
        lambda x, p: _rounded(x),
    ),
    "with_backward": (
        lambda x, p: sg.with_backward(jnp.round, _backward)(x),
        lambda x, p: _rounded(x),
    ),
}
WRAPS = {
    "plain": lambda f: f,
    "vmap": lambda f: lambda x, p: jax.vmap(f, (0, None))(x.reshape(2, 4), p),
    "scan": lambda f: (
        lambda x, p: lax.scan(lambda c, _: (f(c, p), None), x, None, length=3)[0]
    ),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("gate", PAIRS)
def test_no_instruction_more_than_by_hand(gate, wrap):
    x, p = f32(*range(1, 9)), f32(0.3)[0]

    def counts(gate):
        loss = lambda x, p: jnp.sum(jnp.sin(WRAPS[wrap](gate)(x, p)) ** 2)
        both = jax.value_and_grad(loss)
        return instructions(loss, x, p), instructions(both, x, p)

    ours, theirs = (counts(gate) for gate in PAIRS[gate])
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]


def test_straight_through_is_shorter_than_the_textbook_line():
    x = jnp.arange(1.0, 9.0)
    textbook = lambda x: jnp.sum(x + lax.stop_gradient(jnp.round(x) - x))
    ours = lambda x: jnp.sum(sg.straight_through(jnp.round)(x))
    assert instructions(ours, x) < instructions(textbook, x)


def test_per_example_costs_what_a_loop_over_examples_costs():
    """Nothing forward, and one sum over the examples backward."""
    xs = jnp.ones((4, 3))
    total = lambda gate: (
        lambda w: jnp.sum(jax.vmap(lambda x: jnp.tanh(gate(w) * x), axis_name="i")(xs))
    )
    alone = total(lambda w: sg.per_example(w, "i"))
    plain = total(lambda w: w)
    w = jnp.ones(3)
    assert instructions(alone, w) <= instructions(plain, w)
    assert instructions(jax.grad(alone), w) <= instructions(jax.grad(plain), w)


def test_a_frozen_leaf_has_no_gradient_in_the_program():
    params = {"enc": jnp.ones((4, 3)), "head": jnp.ones(3)}
    loss = lambda p: jnp.sum(jnp.sin(p["enc"] @ p["head"]))
    train, rest = sg.partition(params, "head")
    ours = lambda train: jax.grad(lambda t: loss(sg.combine(t, rest)))(train)
    whole = primitives(jax.grad(loss), params)
    names = primitives(ours, train)
    assert names.count("dot_general") < whole.count("dot_general")
    hand = jax.grad(lambda head: loss({"enc": params["enc"], "head": head}))
    assert names == primitives(hand, params["head"])
