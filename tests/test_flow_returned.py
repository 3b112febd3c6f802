"""A value that a jit, checkpoint, vmap or scan returns, apart from what is inside.

Each program comes with what follows the value, split off by hand: `jax.grad` of that
says what the gradient by the value is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, 1.2, -0.8)
stop = jax.lax.stop_gradient


@jax.jit
def encode(a):
    h = jnp.sin(a)
    return h * 2, h


@jax.jit
def twice(a):
    h = jnp.sin(a)
    return h, h


identity, keeps = jax.jit(lambda a: a), jax.jit(lambda a, b: (a * b, b))


def other_result(x):
    z, aux = encode(x)
    return z.sum() + stop(aux).sum()


def both_results(x):
    z, aux = encode(x)
    return z.sum() + (aux * x).sum()


def same_twice(x):
    one, two = twice(x)
    return one.sum() + stop(two).sum()


def argument(x):
    w = identity(x)
    return (x * 2).sum() + stop(w).sum()


def argument_used(x):
    w = identity(x)
    return (x * 2).sum() + (w * w).sum()


def argument_beside(x):
    y, w = keeps(x, 2 * x)
    return y.sum() + jnp.round(w).sum()


def remat(x):
    w = jax.checkpoint(lambda a: a)(x)
    return (x * 2).sum() + stop(w).sum()


def vmapped(x):
    w = jax.vmap(identity)(x)
    return (x * 2).sum() + stop(w).sum()


def deep(x):
    z, aux = jax.jit(lambda a: encode(a))(x)
    return z.sum() + stop(aux).sum()


def carry(x):
    c, ys = jax.lax.scan(lambda c, a: (c * a, c + a), 0.7, x)  # noqa: RUF059
    return ys.sum()


def carry_stopped(x):
    c, ys = jax.lax.scan(lambda c, a: (c * a, c + a), 0.7, x)
    return ys.sum() + stop(c)


def stacked_carry(x):
    c, ys = jax.lax.scan(lambda c, a: (c * a, c * a), 0.7, x)
    return c + stop(ys).sum()


def swapped(x):
    step = lambda c, a: ((c[1], c[0]), c[0] * a)
    (c, d), ys = jax.lax.scan(step, (x[0], x[1]), x)
    return ys.sum() + jnp.round(c) + 3 * d


SIN, TWO = jnp.sin(X), jnp.full(3, 2.0)
# Program, value, its number, what follows it, its status, why it is cut.
CASES = {
    "other result": (
        other_result,
        "aux",
        SIN,
        lambda aux: (SIN * 2).sum() + stop(aux).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "result": (
        other_result,
        "z",
        2 * SIN,
        lambda z: z.sum() + stop(SIN).sum(),
        "flows",
        None,
    ),
    "both": (
        both_results,
        "aux",
        SIN,
        lambda aux: (2 * SIN).sum() + (aux * X).sum(),
        "flows",
        None,
    ),
    "twice, first": (
        same_twice,
        "one",
        SIN,
        lambda one: one.sum() + stop(SIN).sum(),
        "flows",
        None,
    ),
    "twice, second": (
        same_twice,
        "two",
        SIN,
        lambda two: SIN.sum() + stop(two).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "argument": (
        argument,
        "w",
        X,
        lambda w: (X * 2).sum() + stop(w).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "argument, used": (
        argument_used,
        "w",
        X,
        lambda w: (X * 2).sum() + (w * w).sum(),
        "flows",
        None,
    ),
    "argument beside": (
        argument_beside,
        "w",
        2 * X,
        lambda w: (X * 2 * X).sum() + jnp.round(w).sum(),
        "cut",
        "the derivative of round is zero almost everywhere",
    ),
    "remat": (
        remat,
        "w",
        X,
        lambda w: (X * 2).sum() + stop(w).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "vmap": (
        vmapped,
        "w",
        X,
        lambda w: (X * 2).sum() + stop(w).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "jit in jit": (
        deep,
        "aux",
        SIN,
        lambda aux: (SIN * 2).sum() + stop(aux).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "carry": (carry, "c", f32(0.1)[0], lambda c: carry(X), "unused", None),
    "carry, stopped": (
        carry_stopped,
        "c",
        f32(0.1)[0],
        lambda c: carry(X) + stop(c),
        "cut",
        "stop_gradient, on purpose",
    ),
    "carry, stacked": (
        stacked_carry,
        "ys",
        X,
        lambda ys: carry(X) + stop(ys).sum(),
        "cut",
        "stop_gradient, on purpose",
    ),
    "carry, beside it": (
        stacked_carry,
        "c",
        f32(0.1)[0],
        lambda c: c + stop(X).sum(),
        "flows",
        None,
    ),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "and x"])
@pytest.mark.parametrize("name", CASES)
def test_a_value_that_is_returned(name, beside):
    fun, variable, value, rest, status, reason = CASES[name]
    grad = jax.grad(rest)(value)
    assert bool(jnp.any(grad != 0)) == (status == "flows")  # the table itself is right
    var = sg.var(variable)
    flow = sg.flow(fun, xs=[var, "x"] if beside else [var])(X)
    assert flow.inputs[0].status == status
    words = [cut.words for cut in flow.cuts if flow.inputs[0].path in cut.inputs]
    assert words == ([reason] if reason else [])
    if beside:  # and x is what it was
        assert flow.inputs[1].status == "flows"
        assert np.any(jax.grad(fun)(X) != 0)
    contract = sg.assert_gradient if status == "flows" else sg.assert_no_gradient
    broken = sg.assert_no_gradient if status == "flows" else sg.assert_gradient
    contract(fun, var)(X)
    with pytest.raises(AssertionError):
        broken(fun, var)(X)
    found = sg.gradients(fun, var)(X)
    assert (found is None) == (status != "flows")


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[5]])
def test_the_query_says_the_same_reason(name):
    fun, variable, _, _, _, reason = CASES[name]
    ask = sg.gradients(fun, sg.var(variable), unconnected_gradients="error")
    with pytest.raises(ValueError, match=reason) as caught:
        ask(X)
    came = str(caught.value).split("\n")[1]
    assert came.count("(") == 1  # one reason, with its place
    line = fun.__code__.co_firstlineno
    assert any(f":{line + k})" in came for k in (1, 2))


@pytest.mark.parametrize(
    ("fun", "name", "expected"),
    [
        (carry, "scan", ["unused", "flows"]),
        (stacked_carry, "scan", ["flows", "cut"]),
        (swapped, "scan", ["cut", "flows", "flows"]),
        (other_result, "encode", ["flows", "cut"]),
    ],
    ids=["carry", "stacked", "swapped", "jit"],
)
def test_the_results_of_an_operation_are_apart(fun, name, expected):
    flow = sg.flow(fun, xs=sg.op(name))(X)
    rows = [row.status for row in flow.inputs if row.status != "data"]
    assert rows == expected
    found = sg.gradients(fun, sg.op(name))(X)
    assert [grad is not None for grad in found] == [s == "flows" for s in expected]


def test_what_comes_before_the_value_reaches_it():
    for fun, variable in [(other_result, "aux"), (argument, "w"), (carry, "c")]:
        flow = sg.flow(fun, ys=sg.var(variable))(X)
        assert flow.inputs[0].status == "flows"
        assert sg.flow(fun)(X).connected("x", sg.var(variable))
    stopped = lambda x: other_result(stop(x))
    assert sg.flow(stopped, ys=sg.var("aux"))(X).inputs[0].status == "cut"


def test_it_is_no_step_of_its_own():
    plain, asked = sg.flow(other_result)(X), sg.flow(other_result, xs=sg.var("aux"))(X)
    drawn = lambda flow: [
        (s.label, s.callee, s.repeat) for s in flow.steps if s.kind != "input"
    ]
    assert drawn(plain) == drawn(asked)
    assert plain.ops == asked.ops


def test_a_value_that_is_returned_has_the_terms_it_is_a_sum_of():
    def loss(x):
        total = jax.jit(lambda a: jnp.sin(a).sum() + (a * a).sum())(x)
        return total * 1.0

    named = sg.flow(loss, ys=sg.var("total"))(X)
    assert named.terms == sg.flow(loss)(X).terms
    assert len(named.terms) == 2
