"""What is said of an operation in a custom rule's body, and of an empty address."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from test_suggestions import addresses

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X = jnp.float32([0.5, -1.0])


@jax.custom_jvp
def mine(x):
    return jnp.sin(x) * 2.0


mine.defjvp(lambda primals, tangents: (mine(*primals), tangents[0]))


@jax.custom_vjp
def yours(x):
    return jnp.sin(x) * 3.0


yours.defvjp(lambda x: (yours(x), None), lambda _, ct: (ct,))


@jax.custom_jvp
def around(x):
    return yours(x) + 1.0


around.defjvp(lambda primals, tangents: (around(*primals), tangents[0]))


def looped(x):
    return jax.lax.scan(lambda c, _: (mine(c), None), x, None, length=2)[0]


RULES = {
    "relu": (jax.nn.relu, sg.op("max"), [sg.op("relu")]),
    "relu and silu": (
        lambda x: jax.nn.relu(x) + jax.nn.silu(x),
        sg.op("max"),
        [sg.op("relu")],
    ),
    "two": (
        lambda x: jax.nn.relu(x) + jax.nn.relu6(x),
        sg.op("max"),
        [sg.op("relu"), sg.op("relu6")],
    ),
    "jvp": (mine, sg.op("sin"), [sg.op("mine")]),
    "vjp": (yours, sg.op("sin"), [sg.op("yours")]),
    "both": (
        lambda x: mine(x) * yours(x),
        sg.op("sin"),
        [sg.op("mine"), sg.op("yours")],
    ),
    "nested": (around, sg.op("sin"), [sg.op("around")]),
    "scan": (looped, sg.op("sin"), [sg.op("mine")]),
    "jit": (jax.jit(jax.jit(mine)), sg.op("sin"), [sg.op("mine")]),
    "nth": (mine, sg.op("sin", nth=0), [sg.op("mine")]),
    "within": (mine, sg.op("sin", within="mine"), [sg.op("mine")]),
}
VERBS = {
    "edit": lambda f, at: sg.edit(f, {at: lambda op, *xs: op(*xs)})(X),
    "gradients": lambda f, at: sg.gradients(lambda x: jnp.sum(f(x)), at)(X),
    "capture": lambda f, at: sg.capture(f, at)(X),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", RULES)
def test_the_function_that_has_the_rule_is_named(verb, name):
    fun, wrong, right = RULES[name]
    with pytest.raises(sg.AddressError, match="in the body of a custom rule") as caught:
        VERBS[verb](fun, wrong)
    message = str(caught.value)
    assert "()" not in message
    assert re.findall(r'sg\.op\("[^"]*"\)', message.split("write: ")[1]) == [
        repr(at) for at in right
    ]
    for at in addresses(message):
        VERBS[verb](fun, at)


def test_the_line_in_the_body_is_told_where_it_is_known():
    with pytest.raises(sg.AddressError, match=r"for\s+\(.*rules\.py:\d+\)\n"):
        VERBS["capture"](mine, sg.op("sin"))
    with pytest.raises(sg.AddressError, match=r"looked\s+for\n"):
        VERBS["capture"](jax.nn.relu, sg.op("max"))


# An empty address -------------------------------------------------------------------


def named(x):
    return jnp.sum(jax.nn.relu(sg.name(x, "h")))


def bare(x):
    return jnp.sum(x * 2.0)


EVERY = {
    "gradients": lambda f, at: sg.gradients(f, at)(X),
    "ys": lambda f, at: sg.gradients(f, 0, ys=at)(X),
    "stops": lambda f, at: sg.gradients(f, 0, stop_gradients=at)(X),
    "edit": lambda f, at: sg.edit(f, {at: lambda x: x})(X),
    "capture": lambda f, at: sg.capture(f, at)(X),
    "stats": lambda f, at: sg.gradient_stats(f, at)(X),
    "flow": lambda f, at: sg.flow(f, xs=at)(X),
}


@pytest.mark.parametrize("fun", [named, bare])
@pytest.mark.parametrize("empty", ["", sg.point("")], ids=str)
@pytest.mark.parametrize("verb", EVERY)
def test_an_address_is_not_empty(verb, empty, fun):
    with pytest.raises(sg.AddressError) as caught:
        EVERY[verb](fun, empty)
    message = str(caught.value)
    assert f'{empty or chr(34) * 2}: an address is not empty\n  got:   ""' in message
    assert "named scope" not in message
    assert "sg.op" not in message
    if fun is named or not empty:
        found = addresses(message)
        assert found
        for at in found:
            EVERY[verb](fun, at)


def test_a_tree_has_no_empty_path():
    for call in (sg.mask, lambda p, at: sg.freeze(optax.sgd(0.1), at).init(p)):
        with pytest.raises(sg.AddressError, match=r'got: +""[\s\S]*write: "w"'):
            call({"w": X}, "")
