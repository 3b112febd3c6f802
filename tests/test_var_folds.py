"""`sg.var` and `sg.op` where one call of C code, as of `sum`, runs Python repeatedly.

What a statement really assigned is noted while the function runs without us.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

PARTS = [f32(0.3, 0.7), f32(0.6, 1.4), f32(1.3, 1.7)]
SQUARES = [np.sum(np.square(np.array(p))) for p in PARTS]
NOTES = []


def note(x):
    NOTES.append(x)
    return x


def square(x):
    return jnp.sum(x**2)


def wave(x):
    return jnp.sum(jnp.sin(x) * x)


def linear(x):
    return x * 2.0 + 1.0


def squash(x):
    return jnp.tanh(x) * 0.5


def chained(*functions):
    def apply(x):
        for function in functions:
            x = function(x)
        return x

    return apply


def noted(fun, args):
    NOTES.clear()
    fun(*args)
    values = tuple(NOTES)
    return values[0] if len(values) == 1 else values


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


# -- one execution ---


def over_a_list(p):
    y = sum(jnp.sum(w**2) for w in p)
    return note(y)


def over_values(p):
    y = sum(jnp.sum(w**2) for w in dict(enumerate(p)).values())
    return note(y)


def over_pairs(p):
    y = sum(jnp.vdot(u, v) * k for k, (u, v) in enumerate(zip(p, p, strict=True)))
    return note(y)


def over_leaves(p):
    y = 0.5 * sum(wave(w) for w in jax.tree.leaves({"a": p[0], "b": p[1:]}))
    return note(y)


def mapped(p):
    y = sum(map(wave, p))
    return note(y)


def nested(p):
    y = sum(sum(jnp.sin(u) for u in v) for v in p)
    return note(y)


def two_generators(p):
    y = jnp.sqrt(sum(square(v) for v in p) + sum(wave(v) for v in p))
    return note(y)


def in_a_branch(p):
    y = sum(wave(v) for v in p) if len(p) > 1 else wave(p[0])
    return note(y)


def with_a_start(p):
    y = sum((v**2 for v in p), start=jnp.ones(2))
    return note(y).sum()


def added_to(p):
    x = jnp.sum(p[0])
    y = x
    y += sum(wave(v) for v in p)
    return note(y)


def stored(p):
    parts = (wave(v) for v in p)
    y = jnp.sqrt(sum(parts))
    return note(y)


def returned(p):
    def parts():
        return (wave(v) for v in p)

    y = sum(parts())
    return note(y)


def yielded(p):
    def parts():
        yield square(p[0])
        yield from map(wave, p)

    y = sum(parts()) * 2.0
    return note(y)


def handed_on(p):
    def total(parts):
        result = 0.0
        for part in parts:
            result = result + part
        return result

    y = total(wave(v) for v in p)
    return note(y)


def handed_on_to_sum(p):
    y = (lambda parts: sum(parts))(wave(v) for v in p) * 2.0
    return note(y)


def from_a_generator(p):
    y = sum(v * 2.0 for v in (jnp.sin(u) for u in p))
    return note(y).sum()


def reduced(p):
    y = functools.reduce(lambda a, b: jnp.sin(a) * b, map(wave, p))
    return note(y)


def reduced_generator(p):
    y = functools.reduce(operator.mul, (wave(v) for v in p))
    return note(y)


def reduced_by_jax(p):
    y = functools.reduce(jnp.maximum, (wave(v) for v in p))
    return note(y)


def reduced_tree(p):
    y = jax.tree.reduce(operator.add, jax.tree.map(lambda a, b: wave(a * b), p, p))
    return note(y)


def accumulated(p):
    y = list(itertools.accumulate((wave(v) for v in p), lambda a, b: a * b))[-1] + 1.0
    return note(y)


def chosen_by_key(p):
    y = max((wave(v) for v in p), key=lambda x: (x * 2.0).ndim) * 3.0
    return note(y)


def sorted_by_key(p):
    y = sorted((wave(v) for v in p), key=lambda x: (x * 2.0).ndim)[0] * 3.0
    return note(y)


def stacked(p):
    y = jnp.stack(list(map(wave, p)))
    return note(y).sum()


def layers(p):
    y = chained(linear, squash, linear, squash)(p[0])
    return note(y).sum()


def layers_of_two_kinds(p):
    y = chained(linear, jnp.cos, linear)(p[0])
    return note(y).sum()


def layers_reduced(p):
    y = functools.reduce(lambda x, f: f(x), (linear, squash, linear), p[0])
    return note(y).sum()


def inside_an_expression(p):
    z = (y := sum(wave(v) for v in p)) * 2.0
    note(y)
    return z


# -- several ---


def in_a_loop(p):
    total = 0.0
    for q in (p, p[:2], p):
        y = sum(wave(v) for v in q)
        note(y)
        total = total + y
    return total


def side_by_side(p):
    for q in (p, p[:2]):
        y = sum(wave(v) for v in q)  # nothing lies between two executions
        note(y)
    return y


def side_by_side_of_arrays(p):
    for q in (p, p[:2], p):
        y = sum(q)
        note(y)
    return y.sum()


def side_by_side_mapped(p):
    for q in (p, p[:2]):
        y = jnp.sqrt(sum(map(wave, q)))
        note(y)
    return y


def in_two_loops(p):
    total = 0.0
    for _ in range(2):
        for q in (p, p[:2]):
            y = 0.1 * sum(wave(v) * square(v) for v in q) + total
            note(y)
            total = y
    return total


def in_a_helper(p):
    def norm(q):
        y = jnp.sqrt(sum(square(v) for v in q))
        return note(y)

    return norm(p) * norm(p[:2])


def in_a_helper_in_a_loop(p):
    def norm(q):
        y = sum(square(v) for v in q)
        return note(y)

    return sum(norm(p[:k]) for k in (1, 2, 3)) + sum(map(norm, (p, p)))


def in_a_helper_that_is_handed_a_generator(p):
    def total(parts):
        y = sum(v * 2.0 for v in parts)
        return note(y)

    return sum(total(wave(v) * k for v in p) for k in range(2))


def in_a_function_that_is_mapped(p):
    def one(q):
        y = jnp.sum(q**2) * 2.0
        return note(y)

    return sum(list(map(one, p)))


def in_a_function_that_reduces(p):
    def one(a, b):
        y = jnp.sin(a) * b
        return note(y)

    return jnp.sum(functools.reduce(one, p))


def in_a_key(p):
    def one(a):
        y = jnp.sum(jnp.sin(a) * a)
        return note(y).ndim

    return jnp.sum(sorted(p, key=one)[0])


def in_a_generator(p):
    z = sum((y := wave(v)) * 2.0 for v in p)  # noqa: F841
    for v in p:
        note(wave(v))
    return z


def in_a_stored_generator(p):
    parts = ((y := wave(v)) * 2.0 for v in p)  # noqa: F841
    for v in p:
        note(wave(v))
    return sum(parts)


def functions_in_a_loop(p):
    x = p[0]
    for layer in (linear, linear, squash, squash, linear):
        y = layer(x)
        note(y)
        x = y
    return x.sum()


def numbers_before_arrays(p):
    x = 1.0
    for v in p:
        y = x + v
        note(y)
        x = y
    return x.sum()


ONE = [
    *(
        over_a_list,
        over_values,
        over_pairs,
        over_leaves,
        mapped,
        nested,
        two_generators,
    ),
    *(in_a_branch, with_a_start, stored, returned, yielded, handed_on),
    *(handed_on_to_sum, from_a_generator, reduced, reduced_generator),
    *(reduced_by_jax, reduced_tree, accumulated, chosen_by_key, sorted_by_key, stacked),
    *(layers, layers_of_two_kinds, layers_reduced, inside_an_expression),
]
SEVERAL = [
    *(in_a_loop, side_by_side, side_by_side_of_arrays, side_by_side_mapped),
    *(in_two_loops, in_a_helper, in_a_helper_in_a_loop, in_a_key, in_a_generator),
    *(in_a_helper_that_is_handed_a_generator, in_a_function_that_is_mapped),
    *(in_a_function_that_reduces, in_a_stored_generator, functions_in_a_loop),
    *(numbers_before_arrays,),
]


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
