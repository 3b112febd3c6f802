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
