"""`sg.var` of a parameter whose array reaches the function by a second way, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32
from routes import Net, tree, two

import stopgrad_jax as sg

X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .*sg\.name"


def attn(q, k, v):
    return jnp.sum(jax.nn.softmax(q @ k.T) @ v)


def three(a, b, c=1.0):
    return jnp.sum(a * jnp.cos(b) * c)


def step(state, u):
    return jnp.sum(state[0] * jnp.exp(u))


def make(h):
    def made(q):
        return jnp.sum(q) + jnp.sum(h)

    return made


# -- refused: each function is f(tanh(x)) by two ways --


def by_keywords(x):
    h = jnp.tanh(x)
    return attn(q=h, k=h, v=h)


def by_one_keyword(x):
    h = jnp.tanh(x)
    return two(h, b=h)


def by_alias(x):
    h = jnp.tanh(x)
    g = h
    return two(g, h)


def by_alias_of_an_alias(x):
    h = jnp.tanh(x)
    g = k = h
    g = k
    return three(c=2.0, a=g, b=h)


def by_expression(x):
    h = jnp.tanh(x)
    return three([h][0], h)


def by_choice(x):
    h = jnp.tanh(x)
    return two(h if x.ndim else x, h)


def by_container(x):
    h = jnp.tanh(x)
    return tree(h, {"z": h})


def by_container_before(x):
    h = jnp.tanh(x)
    d = {}
    d["z"] = h
    return tree(h, d)


def by_dict_call(x):
    h = jnp.tanh(x)
    return tree(h, dict(z=h))


def by_state(x):
    h = jnp.tanh(x)
    return step((h,), h)


def by_list(x):
    h = jnp.tanh(x)
    state = []
    state.append(h)
    return step(state, h)


def by_object(x):
    h = jnp.tanh(x)
    return Net(h).out(h)


def by_object_before(x):
    h = jnp.tanh(x)
    net = Net(h=h)
    return net(h)


def by_attribute(x):
    h = jnp.tanh(x)
    net = Net(x)
    net.h = h
    return net.out(h)


def by_method(x):
    return Net(x).keep(jnp.tanh(x))


def by_object_of_the_caller(x):
    h = jnp.tanh(x)
    return Net(h).through(h)


def by_closure(x):
    h = jnp.tanh(x)

    def fn(q):
        return q.sum() + h.sum()

    return fn(h)


def by_function_in_closure(x):
    h = jnp.tanh(x)

    def inner():
        return h.sum()

    def fn(q):
        return q.sum() + inner()

    return fn(h)


def by_lambda(x):
    h = jnp.tanh(x)
    fn = lambda q: jnp.sin(q) + jnp.cos(h)
    return jnp.sum(fn(h))


def by_returned_closure(x):
    h = jnp.tanh(x)
    return make(h)(h)


def by_scan(x):
    h = jnp.tanh(x)

    def fn(q):
        return jax.lax.scan(lambda c, t: (c * h[0], None), q[0], q)[0]

    return fn(h)


def by_caller(x):
    def outer(g, h):
        return two(g, h)

    h = jnp.tanh(x)
    g = h
    return outer(g, h)


def by_vmap(x):
    h = jnp.tanh(x)
    return jnp.sum(jax.vmap(lambda q: q * jnp.sum(h))(h))


REFUSED = [
    (by_keywords, ("attn.q", "attn.k", "attn.v")),
    (by_one_keyword, ("two.a", "two.b")),
    (by_alias, ("two.a", "two.b")),
    (by_alias_of_an_alias, ("three.b",)),
    (by_expression, ("three.b",)),
    (by_choice, ("two.b",)),
    (by_container, ("tree.a",)),
    (by_container_before, ("tree.a",)),
    (by_dict_call, ("tree.a",)),
    (by_state, ("step.u",)),
    (by_list, ("step.u",)),
    (by_object, ("Net.out.z",)),
    (by_object_before, ("Net.__call__.z",)),
    (by_attribute, ("Net.out.z",)),
    (by_method, ("Net.out.z",)),
    (by_object_of_the_caller, ("Net.out.z",)),
    (by_closure, ("fn.q",)),
    (by_function_in_closure, ("fn.q",)),
    (by_lambda, ("by_lambda.<lambda>.q",)),
    (by_returned_closure, ("made.q",)),
    (by_scan, ("fn.q",)),
    (by_caller, ("two.b",)),
    (by_vmap, ("q",)),
]


@pytest.mark.parametrize(
    ("fun", "labels"), REFUSED, ids=lambda v: getattr(v, "__name__", "")
)
def test_an_array_that_comes_by_two_ways_is_refused(fun, labels):
    x = jnp.outer(X, W) + jnp.eye(3) if fun is by_keywords else X
    for label in labels:
        address = sg.var(label)
        for asked in (
            sg.gradients(fun, address, ys="return"),
            sg.capture(fun, address),
            sg.edit(fun, {address: lambda v: v * 0.0}),
            sg.gradients(fun, 0, ys="return", stop_gradients=address),
        ):
            with pytest.raises(sg.AddressError, match=BEATS):
                asked(x)


def test_what_is_written_instead_works():
    """A name inside the function is for its own reads: the derivative is the rule's."""

    def named(q, k, v):
        q = sg.name(q, "q")
        return jnp.sum(jax.nn.softmax(q @ k.T) @ v)

    def model(x):
        h = jnp.tanh(x)
        return named(q=h, k=h, v=h)

    x = jnp.outer(X, W) + jnp.eye(3)
    h = jnp.tanh(x)
    found = sg.gradients(model, "q")(x)
    np.testing.assert_allclose(found, jax.grad(attn)(h, h, h), rtol=1e-4, atol=1e-6)
