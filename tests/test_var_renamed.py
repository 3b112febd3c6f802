"""Another name for an array: what the error of `sg.var` says to write is that array."""

import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, -0.7, 1.1)


def of_a_statement(x):
    x = jnp.sin(x)
    h = x
    x = jnp.tanh(x * 2.0)
    return jnp.sum(x * h)


def of_the_argument(x):
    h = x
    return jnp.sum(jnp.sin(x) * h)


def of_what_it_was_before(x):
    for _ in range(2):
        h = x
        x = jnp.tanh(x * 2.0)
        x = x + h
    return jnp.sum(x)


def of_a_swap(x):
    y = jnp.sin(x)
    for _ in range(2):
        x, h = y, x
        y = jnp.cos(x)
    return jnp.sum(y * h)


def block(x):
    h = x
    x = jnp.tanh(x * 2.0)
    return x + h


def in_a_block(x):
    y = jnp.sin(x)
    return jnp.sum(block(y))


def of_a_closure(x):
    y = jnp.sin(x)

    def inner():
        h = y
        return jnp.cos(h)

    return jnp.sum(inner() * y)


@pytest.mark.parametrize(
    ("fun", "write"),
    [
        (of_a_statement, 'sg.var("of_a_statement.x", nth=0)'),
        (of_the_argument, '"x"'),
        (of_what_it_was_before, "sg.name in the source there"),
        (of_a_swap, "sg.name in the source there"),
        (in_a_block, "sg.name in the source there"),
        (of_a_closure, 'sg.var("y")'),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_another_name_of_an_array(fun, write):
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(fun, sg.var("h"))(X)
    assert str(caught.value).splitlines()[-1] == f"  write: {write}"
