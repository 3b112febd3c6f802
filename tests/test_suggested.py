"""What an error says to write is something that the call in question takes.

The law: each address in the last beat of an `AddressError`, written in place of the
wrong one in the same call, is accepted there.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from test_suggestions import addresses

import stopgrad_jax as sg


def loss(params, batch):
    h = sg.name(params["w"] * batch, "h")
    loop = jax.lax.while_loop(
        lambda c: c < 9.0,
        lambda c: sg.name(c * 2.0, "lost"),
        jax.lax.stop_gradient(jnp.max(batch)),
    )
    return jnp.sum(jnp.tanh(h)) + loop


def several(params, batch):
    h = sg.name(params["w"] * batch, "h")
    return {"loss": jnp.sum(h), "count": batch.size + jnp.int32(0)}


ARGS = ({"w": jnp.ones(2), "n": 3}, jnp.ones(2))


def trained(stats):
    step = sg.train.make_step(loss, optax.sgd(0.1), stats=stats)
    params = {"w": jnp.ones(2)}
    return step(step.init(params), ARGS[1])


CALLS = {
    "gradients": lambda a: sg.gradients(loss, a)(*ARGS),
    "stops": lambda a: sg.gradients(loss, "params", stop_gradients=a)(*ARGS),
    "value": lambda a: sg.value_and_gradients(loss, a)(*ARGS),
    "stats": lambda a: sg.gradient_stats(loss, a)(*ARGS),
    "make_step": trained,
    "nonfinite": lambda a: sg.find_nonfinite(loss, a)(*ARGS),
    "ys": lambda a: sg.gradients(several, "params", ys=a)(*ARGS),
    "nonfinite ys": lambda a: sg.find_nonfinite(several, "params", ys=a)(*ARGS),
    "capture": lambda a: sg.capture(loss, a)(*ARGS),
}
WRONG = ["q", "return/los", "los", "hh", "tanh", sg.point("hh"), sg.op("tanh", nth=7)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_said_to_write_is_taken(call, wrong):
    with pytest.raises((sg.AddressError, TypeError)) as caught:
        CALLS[call](wrong)
    message = str(caught.value)
    assert "\n  write: " in message
    for one in addresses(message):
        CALLS[call](one)


def test_what_has_no_ys_is_not_told_of_it():
    with pytest.raises(sg.AddressError) as caught:
        trained("return")
    assert "ys" not in str(caught.value)
    with pytest.raises(sg.AddressError, match='write: ys="return"'):
        sg.gradients(loss, "return")(*ARGS)


def test_only_arguments_are_named_where_only_arguments_are_taken():
    with pytest.raises(sg.AddressError, match=r'write: one of "params", "batch"$'):
        sg.find_nonfinite(loss, "q")(*ARGS)
    with pytest.raises(TypeError, match=r'write: one of "x"$'):
        sg.find_nonfinite(lambda x, n: x * n, "n")(1.0, 2)


def two_losses(p):
    kl = jnp.sum(p["b"] ** 2)
    return {"total": jnp.sum(p["a"] ** 2) + kl, "kl": kl}


BY_AN_OUTPUT = {
    "flow": lambda p: sg.flow(two_losses, xs="return/kl")(p),
    "explain": lambda p: sg.flow(two_losses)(p).explain("return/kl"),
    "focus": lambda p: sg.flow(two_losses)(p).focus("return/kl"),
    "connected": lambda p: sg.flow(two_losses)(p).connected("return/kl"),
    "between": lambda p: sg.flow(two_losses)(p).between("return/kl", "return"),
    "assert_gradient": lambda p: sg.assert_gradient(two_losses, "return/kl")(p),
    "assert_no_gradient": lambda p: sg.assert_no_gradient(two_losses, "return/kl")(p),
}


@pytest.mark.parametrize("verb", BY_AN_OUTPUT)
def test_an_output_is_nothing_to_differentiate_by(verb):
    """The value before it is returned trains; what is returned leads nowhere."""
    p = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(sg.AddressError, match="must be arguments or values inside"):
        BY_AN_OUTPUT[verb](p)
    sg.assert_gradient(two_losses, sg.var("kl"), ys="return/total", args=(p,))


def test_a_mistyped_source_suggests_no_output():
    p = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(sg.AddressError) as raised:
        sg.flow(two_losses)(p).explain("retrn/kl")
    assert "return/" not in str(raised.value).partition("got:")[2]
