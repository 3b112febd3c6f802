"""`sg.var` and `sg.op` where one call of C code, as of `sum`, runs Python repeatedly.

What a statement really assigned is noted while the function runs without us.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folds import (
    ONE,
    PARTS,
    SEVERAL,
    SQUARES,
    added_to,
    chained,
    linear,
    noted,
    square,
    squash,
    wave,
)

import stopgrad_jax as sg


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


@pytest.mark.parametrize("fun", ONE, ids=lambda f: f.__name__)
def test_a_statement_that_ran_once_is_one_value(fun):
    address, expected = sg.var("y"), noted(fun, (PARTS,))
    assert not isinstance(expected, tuple)
    assert_close(sg.capture(fun, address)(PARTS)[1][address], expected)


@pytest.mark.parametrize("fun", SEVERAL, ids=lambda f: f.__name__)
def test_a_statement_that_ran_repeatedly_is_a_tuple(fun):
    address, expected = sg.var("y"), noted(fun, (PARTS,))
    assert isinstance(expected, tuple)
    assert_close(sg.capture(fun, address)(PARTS)[1][address], expected)


def test_an_augmented_assignment():
    address = sg.var("y", nth=1)
    expected = noted(added_to, (PARTS,))
    assert_close(sg.capture(added_to, address)(PARTS)[1][address], expected)


def test_a_norm():
    """Its gradient, its edit and its statistics, in closed form."""

    def norm(tree):
        n = jnp.sqrt(sum(jnp.sum(v**2) for v in tree))
        return n

    address, value = sg.var("n"), np.sqrt(np.float32(sum(SQUARES)))
    assert_close(sg.capture(norm, address)(PARTS)[1], {address: value})
    assert sg.gradients(norm, address)(PARTS) == 1.0
    edited = sg.edit(norm, {address: lambda n: 10.0 * n})
    np.testing.assert_allclose(edited(PARTS), 10.0 * value, rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(edited)(PARTS)[0], 10.0 * PARTS[0] / value, rtol=1e-6
    )
    stats = sg.gradient_stats(norm, address)(PARTS)
    assert {key: float(s.norm) for key, s in stats.items()} == {"n": 1.0}
    held = sg.gradients(norm, 0, stop_gradients=address)
    assert held(PARTS) == [None, None, None]


def weighted(p, w):
    return w * sum(square(v) * w for v in p)


def weighted_map(p, w):
    return w * sum(map(lambda v: square(v) * w, p))


@pytest.mark.parametrize("fun", [weighted, weighted_map], ids=lambda f: f.__name__)
def test_a_function_that_sums_is_one_operation(fun):
    """w^2 s, for w = 3: its derivative 2 w s."""
    once = lambda p, x: fun(p, 2.0 * x)
    address, total = sg.op(fun.__name__), sum(SQUARES)
    value, edit = np.float32(9 * total), {address: lambda f, *xs: 10.0 * f(*xs)}
    assert_close(sg.capture(once, address)(PARTS, 1.5)[1][address], value)
    np.testing.assert_allclose(sg.edit(once, edit)(PARTS, 1.5), 10 * value, rtol=1e-5)
    handed = sg.gradients(once, sg.var(f"{fun.__name__}.w"))(PARTS, 1.5)
    np.testing.assert_allclose(handed, 6 * total, rtol=1e-5)


def test_a_function_that_sums_in_a_loop():
    def several(p, x):
        total = 0.0
        for k in (2.0, 4.0):
            total = total + weighted(p, k * x)
        return total

    def adjacent(p, x):
        return jnp.stack([weighted(p, k * x) for k in (2.0, 4.0)]).sum()

    total = sum(SQUARES)
    for fun in (several, adjacent):
        values = sg.capture(fun, sg.op("weighted"))(PARTS, 1.5)[1][sg.op("weighted")]
        assert_close(values, (np.float32(9 * total), np.float32(36 * total)))
        found = sg.gradients(fun, sg.var("weighted.w"))(PARTS, 1.5)
        assert_close(found, (np.float32(6 * total), np.float32(12 * total)))


def test_a_statement_that_ran_often():
    """Python replaces instructions that ran often by faster ones."""

    def fun(p):
        for k in range(40):
            y = sum(v * k for v in p)
        return jnp.sum(y)

    address, total = sg.var("y"), np.sum(np.array(PARTS), axis=0)
    values = sg.capture(fun, address)(PARTS)[1][address]
    assert_close(values, tuple(np.float32(k) * total for k in range(40)))


# -- what the stacks do not tell ---


def reduced_in_a_loop(p):
    for _ in range(2):
        y = functools.reduce(lambda a, b: jnp.sin(a) * b, p)
    return y.sum()


def started_in_a_loop(p):
    z = jnp.zeros(())
    for q in (p, p[:2]):
        y = sum((wave(v) for v in q), z)
        z = y
    return z


def layers_in_a_loop(p):
    x = p[0]
    for _ in range(2):
        y = chained(linear, squash, linear)(x)
        x = y
    return x.sum()


@pytest.mark.parametrize(
    "fun",
    [reduced_in_a_loop, started_in_a_loop, layers_in_a_loop],
    ids=lambda f: f.__name__,
)
def test_what_cannot_be_told_is_refused(fun):
    with pytest.raises(sg.AddressError, match="where one execution of it ends"):
        sg.capture(fun, sg.var("y"))(PARTS)
