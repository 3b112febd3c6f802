"""What `flow` says of a derivative that the program takes, and of what has a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(1.0, -2.0, 3.0)


def slope_of(f):
    return lambda x: jax.grad(lambda y: f(y).sum())(x).sum()


# (function, what its derivative makes of x that carries no gradient)
DERIVED = {
    "relu": (lambda y: jax.nn.relu(y), "only compared, in jax.nn.relu: bools"),
    "abs": (lambda y: jnp.abs(y), "only compared, in jnp.abs: bools come of it"),
    "clip": (lambda y: jnp.clip(y, 0.0, 1.0), "only compared, in jnp.clip: bools"),
    "sort": (lambda y: jnp.sort(y), "sort, in jnp.sort, gives uint32"),
    "top_k": (lambda y: jax.lax.top_k(y, 2)[0], "top_k, in jax.lax.top_k, gives int32"),
    "by its place": (lambda y: y[jnp.argmax(y)], "argmax, in jnp.argmax, gives int32"),
}


@pytest.mark.parametrize("name", DERIVED)
def test_of_a_derivative_it_is_not_said_that_its_function_returns_bool(name):
    f, words = DERIVED[name]
    slope = slope_of(f)
    assert not np.any(jax.grad(slope)(X))
    flow = sg.flow(slope)(X)
    assert flow.inputs[0].status == "cut"
    told = str(flow.explain("x"))
    assert words in told
    assert "returns" not in told.replace("jax.grad returns", "")


WORDS = {
    "jnp.isnan returns bool": lambda x: (jnp.isnan(x) * 2.0).sum(),
    "jnp.argmax returns int32": lambda x: (jnp.argmax(x) * 2.0).sum(),
}


@pytest.mark.parametrize("words", WORDS)
def test_what_returns_bool_or_integers_is_said_to(words):
    assert words in str(sg.flow(WORDS[words])(X).explain("x"))


def test_of_straight_through_its_own_name_is_said():
    def f(x, w):
        q = sg.straight_through(lambda v: jnp.round(v) * w)(x)
        return q.sum()

    told = str(sg.flow(f)(X, X).explain("w"))
    assert "straight_through takes its value and not its derivative" in told
    assert "replace_value" not in told


def test_a_part_that_a_branch_or_loop_made_has_its_variables_name():
    def f(x):
        plain = jnp.sin(x).sum()
        branch = jax.lax.cond(x[0] > 0, lambda x: x.sum(), lambda x: x.max(), x)
        loop = jax.lax.fori_loop(0, 3, lambda i, s: s * x[0], x[1])
        return branch + plain + loop

    found = sg.flow(f)(X).inputs[0].terms
    assert list(found) == ["branch", "plain", "loop"]


def test_a_part_of_a_larger_expression_has_not():
    def f(x):
        plain = jnp.sin(x).sum()
        loss = plain + jax.lax.cond(x[0] > 0, jnp.sum, jnp.max, x)
        return loss

    assert list(sg.flow(f)(X).inputs[0].terms) == [
        "plain",
        "jax.lax.cond(x[0] > 0, jnp.su...",
    ]


def by_pullback(b, d):
    def model(b):
        h = jnp.sin(b)
        return h * d

    y, pull = jax.vjp(model, b)
    (gb,) = pull(2 * (y - 1))
    return jnp.sum(gb) + jnp.sum(b**2)


def by_one_result(b, d):
    y, pull = jax.vjp(lambda b: jnp.sin(b) * d, b)
    gb = pull(y)[0]
    return jnp.sum(gb) + jnp.sum(b**2)


def by_no_variable(b, d):
    y, pull = jax.vjp(lambda b: jnp.sin(b) * d, b)
    return jnp.sum(pull(y)[0]) + jnp.sum(b**2)


def by_tree(b, d):
    y, pull = jax.vjp(lambda p: jnp.sin(p["b"]) * p["d"], {"b": b, "d": d})
    g = pull(y)[0]
    return jnp.sum(g["b"]) + jnp.sum(g["d"])


def by_linearize(b, d):
    y, push = jax.linearize(lambda b: jnp.sin(b) * d, b)
    slope = push(d)
    return jnp.sum(slope) + jnp.sum(y)


def by_transpose(b, d):
    pull = jax.linear_transpose(lambda b: b * d, b)
    g = pull(b)[0]
    return jnp.sum(g) + jnp.sum(b**2)


def by_force(b, d):
    def energy(b):
        e = jnp.sum(jnp.sin(b) * d)
        return e

    e, pull = jax.vjp(energy, b)
    (force,) = pull(jnp.ones((), jnp.float32))
    return e + jnp.sum(force)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (by_pullback, ["gb", "jnp.sum(b**2)"]),
        (by_one_result, ["gb", "jnp.sum(b**2)"]),
        (by_no_variable, ["jnp.sum(pull(y)[0])", "jnp.sum(b**2)"]),
        (by_tree, ['jnp.sum(g["b"])', 'jnp.sum(g["d"])']),
        (by_linearize, ["slope", "y"]),
        (by_transpose, ["g", "jnp.sum(b**2)"]),
        (by_force, ["e", "force"]),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_a_term_that_a_linear_function_returns_is_no_variable_of_the_model(f, expected):
    """The operations stand where `jax.vjp` was called, not where the result is."""
    flow = sg.flow(f)(X, X + 1)
    assert list(flow.terms) == expected
