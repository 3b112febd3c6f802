"""Of several results of an expression one takes no gradient on: it has a line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


@jax.custom_vjp
def cell(x):
    return x * jnp.sin(x), x + 1.0


cell.defvjp(
    lambda x: (cell(x), x), lambda x, ct: (ct[0] * (jnp.sin(x) + x * jnp.cos(x)),)
)


@jax.custom_jvp
def pushed(x):
    return x**2, jnp.exp(x)


@pushed.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return pushed(x), (2 * x * t, jnp.zeros_like(t))


@functools.partial(jax.jit, inline=False)
def own(x):
    whole = jnp.floor(x)
    return x - whole, whole


def entry(x):
    params = {"a": jnp.sin(x), "b": jnp.cos(x)}
    params = sg.stop_gradient(params, where="b")
    return params["a"], params["b"]


def mapped(x):
    kept = {"a": jnp.sin(x), "b": lax.stop_gradient(jnp.cos(x))}
    new = jax.tree.map(lambda v: jax.nn.softmax(v), kept)
    return new["a"], new["b"]


def quantized(x):
    steps = jnp.round(x / 0.1)
    return x + lax.stop_gradient(steps * 0.1 - x), steps


# A function of x whose second result takes nothing on, and what is said of it.
ONE_OF_TWO = {
    "modf": (lambda x: jnp.modf(x), "floor and ceil, in jnp.modf"),
    "divmod": (lambda x: jnp.divmod(x, 0.4)[::-1], "round, in jnp.divmod"),
    "cell": (cell, "custom rule of cell returns zero for some of its results"),
    "pushed": (pushed, "custom rule of pushed returns zero for some of its results"),
    "own": (own, "derivative of floor is zero"),
    "entry": (entry, "stop_gradient, on purpose"),
    "mapped": (mapped, "stop_gradient, on purpose"),
    "quantized": (quantized, "derivative of round is zero"),
}


def apart(f, x):
    a, b = f(x)
    return {"first": jnp.sum(a**2), "second": jnp.sum((b + 0.5) ** 2)}


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_the_result_that_takes_nothing_on_has_a_line(name, around):
    f, words = ONE_OF_TWO[name]
    x = f32(0.35, 0.55, 1.85)
    f = around(f)
    by_first = jax.grad(lambda x: apart(f, x)["first"])(x)
    assert np.any(by_first)
    assert not np.any(jax.grad(lambda x: apart(f, x)["second"])(x))
    flow = sg.flow(functools.partial(apart, f))(x)
    (row,) = flow.inputs
    assert row.terms == {"return/first": "flows", "return/second": "cut"}
    told = [cut for cut in flow.cuts if words in cut.words]
    assert told
    assert all("x" in cut.inputs for cut in told)
    assert str(flow.explain()).count("So return/second does not train x.") == 1


def summed(f, x):
    a, b = f(x)
    return jnp.sum(a**2) + jnp.sum((b + 0.5) ** 2)


@pytest.mark.parametrize("name", ONE_OF_TWO)
def test_so_it_has_in_a_sum(name):
    """The sum has no column for what no gradient comes back to, but there is a cut."""
    f, words = ONE_OF_TWO[name]
    flow = sg.flow(functools.partial(summed, f))(f32(0.35, 0.55, 1.85))
    assert [row.status for row in flow.inputs] == ["flows"]
    assert any(words in cut.words for cut in flow.cuts)


def scored(x):
    values, places = lax.top_k(x, 2)
    return values, x[places]


ALL_GO_ON = {
    "softmax": lambda x: (jax.nn.softmax(x), jax.nn.log_softmax(x)),
    "logsumexp": lambda x: (jax.nn.logsumexp(x), jax.nn.softmax(x)),
    "map": lambda x: jax.tree.map(jax.nn.softmax, (x, 2 * x)),
    "top_k": scored,
    "eigh": lambda x: jnp.linalg.eigh(jnp.outer(x, x) + jnp.diag(x)),
    "sort": lambda x: (jnp.sort(x), lax.sort_key_val(x, 2 * x)[1]),
    "polar": lambda x: (jnp.hypot(x, 2 * x), jnp.arctan2(x, 3.0)),
}


@pytest.mark.parametrize("name", ALL_GO_ON)
def test_where_all_results_take_it_on_nothing_inside_is_told(name):
    x = f32(0.35, 0.55, 1.85)
    flow = sg.flow(functools.partial(summed, ALL_GO_ON[name]))(x)
    assert [row.status for row in flow.inputs] == ["flows"]
    assert all(cut.reason == "integer" for cut in flow.cuts)
