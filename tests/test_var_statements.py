"""`sg.var` where a variable is assigned more than once, and all ways to assign."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X = f32(0.5)[0]
SIN, COS = np.sin(np.float32(0.5)), np.cos(np.float32(0.5))
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def value(fun, address, *args):
    return sg.capture(fun, address)(*(args or (X,)))[1][address]


def refusal(fun, address, *args):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        value(fun, address, *args)
    return str(caught.value)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


def line(fun, number):
    return fun.__code__.co_firstlineno + number


# -- several statements ---


def layers(x):
    x = jnp.sin(x)
    x = x * 2.0
    x += 1.0
    return x**2


def looped(x):
    h = jnp.cos(x)
    for _ in range(2):
        h = jnp.sin(h)
    return h * 3.0


def branching(x, flag=True):
    if flag:
        h = jnp.sin(x)
    else:
        h = jnp.cos(x)
    return h * 2.0


@pytest.mark.parametrize(
    ("fun", "label", "nth", "expected"),
    [
        (layers, "x", 0, SIN),
        (layers, "x", 1, 2 * SIN),
        (layers, "layers.x", 2, 2 * SIN + 1),
        (layers, "x", -1, 2 * SIN + 1),
        (layers, "layers.x", -3, SIN),
        (looped, "h", 0, COS),
        (looped, "h", 1, (np.sin(COS), np.sin(np.sin(COS)))),
        (branching, "h", 0, SIN),  # both count, though only one has run
        (branching, "h", -2, SIN),
    ],
)
def test_the_nth_statement(fun, label, nth, expected):
    assert_close(value(fun, sg.var(label, nth=nth)), expected)


def test_the_statement_of_a_line():
    for number, expected in ((1, SIN), (2, 2 * SIN), (3, 2 * SIN + 1)):
        address = sg.var("x", line=line(layers, number))
        assert_close(value(layers, address), expected)
    over_two_lines = lambda x: wrapped(x) * 2
    for number in (1, 2, 3):
        address = sg.var("h", line=line(wrapped, number))
        assert_close(value(over_two_lines, address), SIN)


# fmt: off
def wrapped(x):
    h = (
        jnp.sin(
            x))
    h = h * 1.0
    return h
# fmt: on


def test_gradients_and_edits_at_one_of_several_statements():
    first, last = sg.var("x", nth=0), sg.var("x", nth=-1)
    assert_close(sg.gradients(layers, first)(X), np.float32(4 * (2 * SIN + 1)))
    assert_close(sg.gradients(layers, last)(X), np.float32(2 * (2 * SIN + 1)))
    edited = sg.edit(layers, {first: lambda h: h * 0.0 + 1.0})
    assert_close(edited(X), np.float32(9.0))
    assert sg.gradients(layers, 0, stop_gradients=first)(X) is None


def test_which_statement_is_to_be_said():
    message = refusal(layers, sg.var("x"))
    first = line(layers, 1)
    assert f"test_var_statements.py:{first} (layers): x = jnp.sin(x)" in message
    assert f'sg.var("x", line={first}) or sg.var("layers.x", nth=0)\n' in message
    assert f'sg.var("x", line={first + 2}) or sg.var("layers.x", nth=2)' in message


def test_statements_on_one_line_are_told_apart_by_number():
    # fmt: off
    def both(x):
        h = jnp.sin(x); h = h * 2.0  # noqa: E702
        return h
    # fmt: on
    message = refusal(both, sg.var("h", line=line(both, 1)))
    assert 'write: sg.var("both.h", nth=0)\n         sg.var("both.h", nth=1)' in message
    assert_close(value(both, sg.var("both.h", nth=1)), 2 * SIN)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (sg.var("x", nth=3), "nth=3, where none of these is meant"),
        (sg.var("x", nth=-4), "nth=-4, where none"),
        (sg.var("layers.x", line=1), "line=1, where none"),
        (sg.var("y", nth=0), 'variables "x"'),
    ],
)
def test_lines_and_numbers_that_mean_none(address, message):
    said = refusal(layers, address)
    assert message in said
    if address.label != "y":
        assert 'sg.var("layers.x", nth=0)' in said


@pytest.mark.parametrize("wrong", [{"line": "3"}, {"nth": 1.0}, {"nth": True}])
def test_lines_and_numbers_are_integers(wrong):
    with pytest.raises(TypeError, match=BEATS):
        sg.var("x", **wrong)
    with pytest.raises(TypeError, match="the name of a variable"):
        sg.var(3)


# -- a statement that leaves no operation may have changed it, too ---


def test_another_array_without_an_operation():
    def f(x, z):
        h = jnp.sin(x)
        if z is not None:
            h = z
        return h * 2.0

    message = refusal(f, sg.var("h"), X, X)
    assert "h = z, which made no operation: it may have run" in message
    assert f'sg.var("h", line={line(f, 1)})' in message
    assert_close(value(f, sg.var("h", nth=0), X, X), SIN)
    message = refusal(f, sg.var("h", nth=1), X, X)
    assert "h = z, which made no operation: another name for an array" in message
    assert 'write: "z"' in message


def test_statements_that_can_be_no_other_array():
    def f(x, drop=lambda h: h):
        h = None
        h = jnp.sin(x)
        h = drop(h)  # at test time
        h = h.astype(jnp.float32)
        if h.ndim > 3:
            h = h * 2.0  # an operation, had it run
            h += 1.0
        return h * 2.0

    assert_close(value(f, sg.var("h")), SIN)


def other(x, seen):
    y, z = jnp.sin(x), jnp.cos(x)
    y = z
    return y


def later_round(x, seen):
    y = jnp.sin(x)
    for k in range(2):
        if k:
            y = x
        else:
            y = jnp.cos(y)
    return y


def constant(x, seen):
    y = jnp.sin(x)
    seen.append(y)
    y = 2.0
    return y


def stored(x, seen):
    seen.append(jnp.cos(x))
    y = x
    return y


def handed_back(x, seen):
    seen.append(jnp.cos(x))
    return x


def renamed(fun, x):
    seen = [0.0]
    value = fun(x, seen)
    return value * 2.0 + seen[-1]


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (other, f"test_var_statements.py:{line(other, 2)} may change"),
        (later_round, "may change"),
        (constant, "may change"),
        (stored, "returns y, and no operation makes it"),
        (handed_back, "returns x, which it was given"),
    ],
)
def test_a_function_that_returns_another_name(fun, message):
    said = refusal(lambda x: renamed(fun, x), sg.var("value"))
    assert message in said


def test_a_function_that_returns_what_one_of_two_branches_made():
    def kept(x, seen):
        y = jnp.cos(x)
        if x.ndim:
            y = x
        else:
            y = jnp.sin(x)
        return y

    assert_close(value(lambda x: renamed(kept, x), sg.var("value")), SIN)


def test_a_call_that_may_return_either_argument():
    def second(a, b, seen):
        seen.append(a)
        return b

    def first(a, flag=True):
        return a

    def f(x):
        seen = []
        y = second(jnp.sin(x), x, seen)
        h = first(jnp.cos(x), flag=False)
        return y * h * seen[-1]

    assert "which of its arguments" in refusal(f, sg.var("y"))
    assert_close(value(f, sg.var("h")), COS)


# -- all the ways to assign ---


def test_in_an_expression():
    def f(x):
        doubled = (y := jnp.sin(x)) * 2.0
        if (n := jnp.cos(x)).ndim == 0:
            doubled = doubled + n
        z = [(last := y * k) for k in (1.0, 2.0)]
        return doubled + z[0] + last

    names = [sg.var("y"), sg.var("n"), sg.var("last"), sg.var("doubled", nth=0)]
    found = sg.capture(f, names)(X)[1]
    expected = [SIN, COS, (SIN, 2 * SIN), 2 * SIN]
    assert_close([found[n] for n in names], expected)
    assert_close(sg.gradients(f, sg.var("n"))(X), np.float32(1.0))


def test_one_variable_in_and_around_an_expression():
    def f(x):
        h = (h := jnp.sin(x)) * 2.0
        return h + 1.0

    assert_close(value(f, sg.var("h", nth=0)), 2 * SIN)
    assert_close(value(f, sg.var("h", nth=1)), SIN)


def test_parts_of_values():
    pair = jax.jit(lambda x: ((x * 2.0, x * 3.0), x + 1.0))

    def f(x):
        (a, b), c = pair(x)
        (d, e), g = (jnp.sin(x), jnp.cos(x)), x * 5.0
        first, *_, last = jnp.split(jnp.stack([x, x * 2, x * 3]), 3)
        u = v = x * 7.0
        k: jax.Array = jnp.sin(x)
        return a + b + c + d + e + g + (first + last).sum() + u * v + k

    expected = {"a": 1.0, "b": 1.5, "c": 1.5, "d": SIN, "e": COS, "g": 2.5}
    expected |= {"first": f32(0.5), "last": f32(1.5), "u": 3.5, "v": 3.5, "k": SIN}
    names = [sg.var(n) for n in expected]
    found = sg.capture(f, names)(X)[1]
    for name, want in zip(names, expected.values(), strict=True):
        np.testing.assert_allclose(found[name], want, rtol=1e-5)


def test_a_list_that_a_star_takes():
    def f(x):
        first, *rest = jnp.split(jnp.stack([x, x * 2, x * 3]), 3)
        return first.sum() + rest[0].sum()

    assert "takes a value apart" in refusal(f, sg.var("rest"))


class Manager:
    def __init__(self, x):
        self.x = x

    def __enter__(self):
        return jnp.sin(self.x)

    def __exit__(self, *args):
        pass


def for_loop(x):
    for _, h in enumerate((jnp.sin(x), jnp.cos(x))):
        x = x + h
    return x


def with_block(x):
    with Manager(x) as h:
        return h * 2.0


def comprehension(x):
    return sum([h * 2.0 for h in (jnp.sin(x), jnp.cos(x))])


def imported(x):
    from math import pi as h

    return x * h


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (for_loop, "where a loop hands over one after the other"),
        (with_block, "where a context manager hands it over"),
        (comprehension, "where a comprehension hands over one after the other"),
        (imported, "which is no array"),
    ],
)
def test_what_is_bound_otherwise(fun, message):
    assert message in refusal(fun, sg.var("h"))
    assert "write: sg.name in the source there" in refusal(fun, sg.var("h"))


# -- scopes whose names look like JAX's transforms ---


@pytest.mark.parametrize("scope", ["transpose(x)", "jvp(x)", "transpose(jvp(x))"])
def test_scopes_are_no_transforms(scope):
    def f(x):
        with jax.named_scope(scope):
            feat = sg.name(jnp.sin(x), "n")
        return feat * 2.0

    assert_close(value(f, sg.var("feat")), SIN)
    for address in (sg.var("feat"), "n", sg.op("sin")):
        if isinstance(address, sg._address.Op):
            edit = lambda sin, x: sin(x) + 1.0
        else:
            edit = lambda h: h + 1.0
        assert_close(sg.edit(f, {address: edit})(X), np.float32(2 * SIN + 2))
