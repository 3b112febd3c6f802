"""`sg.var` of a parameter: the value that a function was handed."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import models_unedited as models
import numpy as np
import pytest
from flax import nnx
from programs import f32

import stopgrad_jax as sg

X = f32(0.5, 1.0)
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def value(fun, label, *args):
    address = sg.var(label)
    return sg.capture(fun, address)(*(args or (X,)))[1][address]


def refusal(fun, label, *args):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        value(fun, label, *args)
    return str(caught.value)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


def scaled(p, q=1.0):
    return jnp.sin(p) * q


def both(p, q):
    return jnp.sin(p) * q


# -- the meaning ---


def test_the_value_that_is_handed_in(run):
    f = lambda x: scaled(x * 3.0)
    address = sg.var("scaled.p")
    assert_close(run(sg.capture(f, address))(X)[1][address], 3 * X)
    found = run(sg.gradients(f, address, ys="return"))(X)
    assert_close(found, jnp.cos(3 * X))
    assert sg.gradients(f, 0, ys="return", stop_gradients=address)(X) is None
    assert_close(sg.gradients(f, 0, ys=address)(X), jnp.full(2, 3.0))
    edited = run(sg.edit(f, {address: lambda p: p + 1.0}))
    assert_close(edited(X), jnp.sin(3 * X + 1))
    zero = {address: jnp.zeros(2, jnp.float32)}
    perturbed = lambda z: sg.perturb(f, address)(z, X).sum()
    assert_close(jax.grad(perturbed)(zero)[address], jnp.cos(3 * X))


def test_only_the_uses_in_the_function_count():
    def f(x):
        before = jnp.cos(x).sum()
        return scaled(x) * before

    address = sg.var("p")
    found = sg.gradients(f, address, ys="return")(X)
    assert_close(found, jnp.cos(X) * jnp.cos(X).sum())
    edited = sg.edit(f, {address: lambda p: p * 0.0})(X)
    np.testing.assert_array_equal(edited, [0.0, 0.0])
    again = sg.edit(f, {address: lambda p: p * 2.0})(X)
    assert_close(again, jnp.sin(2 * X) * jnp.cos(X).sum())


def test_a_function_that_is_called_by_another_one():
    def outer(h):
        return scaled(h) + h

    f = lambda x: outer(x * 2.0)
    inner, around = sg.var("scaled.p"), sg.var("outer.h")
    assert "used after the call" in refusal(f, "scaled.p")
    g = lambda x: (lambda h: scaled(h) * 2.0)(x * 2.0)
    found = sg.gradients(g, [inner, sg.var("h")], ys="return")(X)
    assert_close(found, [2 * jnp.cos(2 * X)] * 2)
    assert_close(sg.gradients(f, around, ys="return")(X), jnp.cos(2 * X) + 1)
    both = {inner: lambda p: p + 1.0, sg.var("h"): lambda h: h * 3.0}
    assert_close(sg.edit(g, both)(X), 2 * jnp.sin(6 * X + 1))


def test_several_calls_are_a_tuple():
    def f(x):
        for _ in range(2):
            x = scaled(x) + 1.0
        return x

    once = jnp.sin(X) + 1
    assert_close(value(f, "p"), (X, once))
    g = lambda x: scaled(x * 2) + scaled(x * 3)
    assert_close(value(g, "p"), (2 * X, 3 * X))

    def in_progress(x):
        for _ in range(2):
            x = jnp.cos(x) + scaled(x)
        return x

    first = jnp.cos(X) + jnp.sin(X)
    assert_close(value(in_progress, "p"), (X, first))


def test_a_variable_of_the_caller_while_it_is_assigned_to():
    def f(x):
        x = scaled(x * 2.0) + scaled(x)
        return x

    assert_close(value(f, "scaled.p"), (2 * X, X))


def test_assignments_come_first():
    def g(h):
        h = jnp.sin(h)
        return h * 2.0

    f = lambda x: g(x * 3.0)
    line = g.__code__.co_firstlineno
    assert_close(value(f, "g.h"), jnp.sin(3 * X))
    handed = sg.var("g.h", line=line)
    assert_close(sg.capture(f, handed)(X)[1][handed], 3 * X)
    with pytest.raises(sg.AddressError, match="where none of these"):
        sg.capture(f, sg.var("g.h", nth=1))(X)


# -- functions that JAX traces by themselves ---


def jitted(x):
    inner = jax.jit(lambda q, r: q * r)
    return inner(x * 2.0, x)


def scanned(x):
    def body(c, u):
        return c * u + 1.0, c

    return jax.lax.scan(body, x, jnp.stack([x, x]))[0]


def remat(x):
    return jax.checkpoint(lambda q: jnp.cos(q) * 2.0)(x * 2.0)


def branch(x):
    yes, no = lambda q: scaled(q), lambda t: t
    return jax.lax.cond(x.sum() > 0, yes, no, x * 2.0)


def closed_over(x):
    body = lambda c, _: (c * x, None)
    return jax.lax.scan(body, x * 2.0, None, length=2)[0]


def vmapped(x):
    return jax.vmap(lambda q: scaled(q * 2.0))(x)


def ruled(x):
    rule = jax.custom_jvp(lambda q: jnp.sin(q))
    rule.defjvp(lambda p, t: (rule(*p), t[0]))
    return rule(x * 2.0)


@pytest.mark.parametrize(
    ("fun", "label", "expected"),
    [
        (jitted, "q", 2 * X),
        (jitted, "jitted.<lambda>.r", X),
        (scanned, "body.c", jnp.stack([X, X * X + 1])),
        (scanned, "scanned.body.u", jnp.stack([X, X])),
        (remat, "q", 2 * X),
        (branch, "scaled.p", 2 * X),
        (branch, "branch.<lambda>.q", 2 * X),
        (closed_over, "c", jnp.stack([2 * X, 2 * X * X])),
        (vmapped, "vmapped.<lambda>.q", X),
        (vmapped, "scaled.p", 2 * X),
        (ruled, "q", 2 * X),
        (jax.jit(scaled), "p", X),
    ],
)
def test_functions_that_are_traced_by_themselves(fun, label, expected):
    assert_close(value(fun, label), jnp.asarray(expected))


def test_each_step_of_a_scan_is_edited():
    edited = sg.edit(scanned, {sg.var("body.c"): lambda c: c * 2.0})
    expected = 2 * (2 * X * X + 1) * X + 1
    assert_close(edited(X), expected)
    found = sg.gradients(scanned, sg.var("body.u"), ys="return")(X)
    assert_close(found, jnp.stack([X * X, X * X + 1]))


def counted(x, rounds=3):
    def step(i, v):
        return jnp.sin(v) + i

    return jax.lax.fori_loop(0, rounds, step, x)


@pytest.mark.parametrize("rounds", [3, np.int32(3)])
def test_the_count_of_a_loop_is_not_edited(rounds):
    """JAX counts with what it hands over: that goes on as it was."""
    fun = lambda x, n: counted(x, n)
    for factor in (2, 0):
        edited = sg.edit(fun, {sg.var("step.i"): lambda i, f=factor: i * f})
        v = jnp.float32(1.0)
        for k in range(3):
            v = jnp.sin(v) + factor * k
        assert_close(edited(1.0, rounds), v)


def test_a_tree_of_an_inner_function():
    @jax.jit
    def inner(p):
        return p["a"] * p["b"]

    f = lambda x: inner({"a": x, "b": x * 2.0})
    assert "it is a container of arrays" in refusal(f, "inner.p")


# -- how it is called ---


class Cell:
    def __init__(self, weight):
        self.weight = weight * 2.0

    def __call__(self, h):
        return h * self.weight

    def step(self, h, k):
        return h * k * self.weight

    @staticmethod
    def plain(h):
        return jnp.cos(h)

    @classmethod
    def other(cls, h):
        return jnp.cos(h)


def handed_on(fun):
    @functools.wraps(fun)
    def wrapper(*args, **kwargs):
        return fun(*args, **kwargs)

    return wrapper


wrapped = handed_on(scaled)


def of_a_tree(batch):
    return scaled(batch["u"]) + batch["v"]


def by_walrus(x):
    if (h := x * 2.0) is not None:
        return scaled(h)


def in_the_call(x):
    return scaled(h := x * 2) + h.ndim


@pytest.mark.parametrize(
    ("fun", "label", "expected"),
    [
        (lambda x: Cell(x)(2.0), "Cell.__init__.weight", X),
        (lambda x: Cell(x * 2)(x * 3), "Cell.__init__.weight", 2 * X),
        (lambda x: Cell(x * 2)(x * 3), "__call__.h", 3 * X),
        (lambda x: Cell(x).step(x * 3, k=x * 5), "step.h", 3 * X),
        (lambda x: Cell(x).step(x * 3, k=x * 5), "Cell.step.k", 5 * X),
        (lambda x: Cell.step(Cell(x), x * 3, x * 5), "step.h", 3 * X),
        (lambda x: Cell.plain(x * 2), "h", 2 * X),
        (lambda x: Cell.other(x * 2), "h", 2 * X),
        (lambda x: wrapped(x * 2), "scaled.p", 2 * X),
        (in_the_call, "scaled.p", 2 * X),
        (lambda x: scaled(x * 2 if x.ndim else x), "p", 2 * X),
        (lambda x: both(q=x * 2, p=x * 3), "both.p", 3 * X),
        (lambda x: jax.grad(lambda r: scaled(r).sum())(x * 2), "p", 2 * X),
        (by_walrus, "scaled.p", 2 * X),
    ],
    ids=range(14),
)
def test_ways_to_call(fun, label, expected):
    assert_close(value(fun, label), expected)


def test_a_part_of_an_argument():
    assert_close(value(of_a_tree, "scaled.p", {"u": X, "v": 2 * X}), X)


# -- models that nobody edited ---


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dense(3)(inputs)


class AutoEncoder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = Encoder(), nn.Dense(2)

    def __call__(self, x, train=False):
        code = self.encoder(jnp.sin(x), train=train)
        return self.decoder(code)


@pytest.mark.parametrize(
    "apply", [lambda m: m.apply, lambda m: lambda p, x: m.apply(p, x)]
)
def test_flax_linen(apply):
    model, x = AutoEncoder(), X[None]
    params = model.init(jax.random.key(0), x)
    found = value(apply(model), "Encoder.__call__.inputs", params, x)
    assert_close(found, jnp.sin(x))
    kernels = params["params"]
    first = jnp.sin(x) @ kernels["encoder"]["Dense_0"]["kernel"]
    assert_close(
        value(apply(model), "Dense.__call__.inputs", params, x), (jnp.sin(x), first)
    )


def test_haiku_equinox_and_nnx():
    net = hk.transform(lambda x: models.Haiku()(jnp.sin(x)))
    image = jnp.ones((1, 4, 4, 1), jnp.float32)
    params = net.init(jax.random.key(0), image)
    for fun in (net.apply, lambda p, k, x: net.apply(p, k, x)):
        found = value(fun, "Haiku.__call__.x", params, jax.random.key(0), image)
        assert_close(found, jnp.sin(image))
    norm = eqx.nn.LayerNorm(2, dtype=jnp.float32)
    many = lambda x: jax.vmap(norm)(jnp.sin(x))
    assert_close(value(many, "LayerNorm.__call__.x", X[None]), jnp.sin(X[None]))
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    fun = lambda x: layer(jnp.sin(x))
    assert_close(value(fun, "Linear.__call__.inputs"), jnp.sin(X))
