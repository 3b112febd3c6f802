"""A function that an edit made is asked as its source was: variables, lines, words.

The oracle of a value is a list that the program itself fills, with the change written
by hand where the edit makes it; that of a line is the source.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, keep, kept, same

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, -0.7, 1.1)


def once(change):
    def program(x):
        h = jnp.sin(x)
        y = change(keep(h)) * 2.0
        return sg.name(y.sum(), "p")

    return program


def in_a_loop(change):
    def program(x):
        for i in range(3):
            h = jnp.sin(x) + i
            x = change(keep(h))
        return sg.name(x.sum(), "p")

    return program


def over_layers(change):
    def program(x):
        for layer in (jnp.sin, jnp.tanh, jnp.sin, jnp.tanh):
            h = layer(x) * 2.0
            x = change(keep(h)) + 1.0
        return sg.name(x.sum(), "p")

    return program


def in_calls(change):
    def block(x):
        h = jnp.sin(x) * x
        return change(keep(h)) + x

    def program(x):
        return sg.name((block(x) + block(2.0 * x) + block(3.0 * x)).sum(), "p")

    return program


def in_a_scan(change):
    def round_of(x, t):
        h = jnp.sin(x) * t
        return change(keep(h)) + x, None

    def program(x):
        return sg.name(jax.lax.scan(round_of, x, f32(1.0, 2.0))[0].sum(), "p")

    return program


PROGRAMS = (once, in_a_loop, over_layers, in_calls, in_a_scan)
ELSEWHERE = {
    "a point": lambda f: sg.edit(f, {"p": lambda p: p * 1.0}),
    "an operation": lambda f: sg.edit(f, {sg.op("reduce_sum"): lambda s, x: s(x)}),
    "twice": lambda f: sg.edit(sg.edit(f, {"p": lambda p: -p}), {"p": lambda p: p}),
    "jitted before": lambda f: called(jax.jit(sg.edit(f, {"p": lambda p: p}))),
    "its gradient": lambda f: jax.grad(sg.edit(f, {"p": lambda p: p * 1.0})),
    "captured": lambda f: lambda x: sg.capture(f, "p")(x)[0],
    "differentiated": lambda f: lambda x: sg.gradients(f, "x")(x),
}

DERIVED = (ELSEWHERE["its gradient"], ELSEWHERE["differentiated"])


def called(f):
    f(X)
    return f


def recorded(f):
    """What the variable was in a run of the program."""
    kept.clear()
    with jax.disable_jit():
        f(X)
    return np.stack(kept)


def captured(f, address):
    found = sg.capture(f, address)(X)[1][address]
    return np.concatenate([np.reshape(h, (-1, 3)) for h in jax.tree.leaves(found)])


@pytest.mark.parametrize("way", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("program", PROGRAMS)
def test_variables_of_a_function_that_was_changed_elsewhere(program, way):
    f = program(same)
    if program is in_a_scan and way in DERIVED:
        pytest.skip("JAX makes other operations of a scan that it differentiates")
    got = captured(way(f), sg.var("h"))
    np.testing.assert_allclose(got, recorded(f), rtol=1e-6)


@pytest.mark.parametrize("change", [same, jnp.copy, lambda h: h * 3.0 + 1.0])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_value_before_an_edit_of_the_same_variable(program, change):
    edited = sg.edit(program(same), {sg.var("h"): change})
    np.testing.assert_allclose(edited(X), program(change)(X), rtol=1e-6)
    got = captured(edited, sg.var("h"))
    np.testing.assert_allclose(got, recorded(program(change)), rtol=1e-6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_edit_of_an_edited_variable_comes_before_it(program):
    h, second = sg.var("h"), lambda h: h + 1.0
    edited = sg.edit(sg.edit(program(same), {h: lambda h: h * 3.0}), {h: second})
    by_hand = program(lambda h: second(h) * 3.0)
    np.testing.assert_allclose(edited(X), by_hand(X), rtol=1e-6)
    slope = jax.grad(by_hand)(X)
    np.testing.assert_allclose(jax.grad(edited)(X), slope, rtol=1e-5)


def test_two_statements_are_told_apart_in_true_words():
    def f(x):
        h = jnp.sin(x)
        h = h * 2.0
        return jnp.sum(h * h)

    with pytest.raises(sg.AddressError, match="one statement must assign") as error:
        sg.capture(f, sg.var("h"))(X)
    assert "other arrays" not in str(error.value)


def alike(x):
    a = jnp.log(x + 4.0) * 2.0
    b = jnp.log(x + 5.0) * 2.0
    c = jnp.log(x) * 2.0
    d = jnp.floor(x) + 9.0
    e = jnp.floor(x) + 9.0
    f = jnp.floor(x) + 9.0
    return sg.name((a + b + c).sum() + (d + e + f).sum(), "p")


def line_of(text):
    lines, start = inspect.getsourcelines(alike)
    return start + next(k for k, line in enumerate(lines) if text in line)


CHANGED = {
    "not": same,
    "edited": lambda f: sg.edit(f, {"p": lambda p: p * 2.0}),
    "edited before": lambda f: called(jax.jit(sg.edit(f, {"p": lambda p: p * 2.0}))),
    "captured": lambda f: lambda x: sg.capture(f, "p")(x)[0],
    "perturbed": lambda f: lambda x: sg.perturb(f, "p")({"p": 0.0}, x),
}


@pytest.mark.parametrize("way", CHANGED.values(), ids=CHANGED)
def test_lines_of_equal_operations_are_those_of_each(way):
    found = sg.find_nonfinite(way(alike))(f32(-0.5, 1.0))
    assert f"test_edited_again.py:{line_of('c = ')}" in str(found)
    words = str(sg.flow(way(alike))(X).explain("x"))
    for name in "def":
        assert f"test_edited_again.py:{line_of(f'{name} = ')}" in words


def test_sharing_lines_is_for_what_nobody_reads():
    f = sg.edit(alike, {"p": lambda p: p * 2.0})
    before = str(jax.make_jaxpr(f)(X))
    sg.flow(f)(X)
    assert str(jax.make_jaxpr(f)(X)) == before


def tree(x):
    t = sg.name({"a": x, "b": x * 2}, "t")
    return t["a"] + t["b"] * 10


def raised(t):
    return {k: v + 1.0 for k, v in t.items()}


def test_a_leaf_is_edited_after_its_tree_where_that_comes_first():
    x = jnp.float32(1.0)
    times = lambda v: v * 100.0
    assert sg.edit(tree, {"t": lambda t: t, "t/a": times})(x) == 120
    assert sg.edit(tree, {"t": raised, "t/*": times})(x) == 200 + 3000
    assert sg.edit(tree, {"t/*": times, "t": raised})(x) == 101 + 2010
    assert sg.edit(tree, {"t": raised, "t/a": times, "t/*": lambda v: -v})(x) == -230
    stopped = {"t": lambda t: t, "t/a": jax.lax.stop_gradient}
    assert jax.grad(sg.edit(tree, stopped))(x) == 20

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c + tree(x), None), 0.0 * x, None, length=3)[
            0
        ]

    assert jax.grad(sg.edit(scanned, stopped))(x) == 60


def test_two_addresses_of_one_point_are_two_edits_in_their_order():
    f = lambda x: sg.name(x**2, "h") * 3.0
    more, times = (lambda h: h + 1.0), (lambda h: h * 10.0)
    x = jnp.float32(2.0)
    assert sg.edit(f, {"h": more, sg.point("h"): times})(x) == 150
    assert sg.edit(f, {sg.point("h"): times, "h": more})(x) == 123
