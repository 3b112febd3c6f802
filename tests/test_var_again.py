"""`sg.var` and `sg.op` where one statement is executed again, by another function.

What each execution assigned is noted while the function runs without us.
"""

import itertools
import random
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

X = jnp.array([0.3, 0.7])
NOTED = []
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def note(value):
    """Note what was assigned, where nobody traces."""
    if not isinstance(value, jax.core.Tracer):
        NOTED.append(value)


def noted(fun, *args):
    NOTED.clear()
    with jax.disable_jit():
        fun(*args)
    assert NOTED
    return tuple(NOTED) if len(NOTED) > 1 else NOTED[0]


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


def squash(x):
    return jnp.tanh(x)


def mixed(x):
    return jax.nn.softmax(x @ jnp.array([[0.5, 0.1], [0.0, 0.5]]))


class Layer:
    def __init__(self, last):
        self.last = last

    def __call__(self, x):
        if self.last:
            return x * 0.5
        x = x * 0.9
        return jnp.tanh(x)


def turned(x, i):
    if i % 2:
        return jnp.cos(x)
    r = x * 0.7
    return r + 0.1


def two_functions(x):
    for act in (squash, jnp.sin):
        x = act(x) + 1.0
        note(x)
    return x


def residual(x):
    for layer in (mixed, squash, mixed, squash):
        x = x + layer(x)
        note(x)
    return x


def of_jax(x):
    for act in (jax.nn.relu, jnp.tanh, jax.nn.gelu):
        x = act(x) * 2.0
        note(x)
    return x


def nothing_but_the_call(x):
    for act in (jnp.sin, jnp.cos, jnp.cos):
        x = act(x)
        note(x)
    return x


def handed_on(x):
    for act in (squash, jnp.sin, jax.nn.relu, squash):
        x = jnp.tanh(act(x))
        note(x)
    return x


def added(x):
    u = x * 2.0
    for act in (squash, jnp.sin, jax.nn.relu):
        x += act(u)
        note(x)
    return x


def one_of_two(x):
    for i in range(3):
        x = (x * 2.0 if i == 1 else jnp.sin(x)) + 1.0
        note(x)
    return x


def early(x):
    for layer in (Layer(True), Layer(False), Layer(False), Layer(True)):
        x = layer(x)
        note(x)
    return x


def turning(x):
    for i in (1, 0, 0, 1, 1):
        x = turned(x, i)
        note(x)
    return x


def while_it_lasts(x):
    i = 0
    while i < 3:
        x = (x * 2.0 if i == 0 else jnp.sin(x)) + 1.0
        note(x)
        i += 1
    return x


def with_a_loop_inside(x):
    for fs in ((squash, mixed), (mixed, jnp.sin)):
        for f in fs:
            x = f(x) * 0.5
            note(x)
    return x


def listed(x):
    for i in range(2):
        x = [f(x) for f in (squash, jnp.sin)][i] * 0.5
        note(x)
        x = x + 1.0
    return x


AGAIN = (
    two_functions,
    residual,
    of_jax,
    nothing_but_the_call,
    handed_on,
    added,
    one_of_two,
    early,
    turning,
    while_it_lasts,
    with_a_loop_inside,
    listed,
)


@pytest.mark.parametrize("fun", AGAIN, ids=lambda f: f.__name__)
def test_each_execution_is_a_value(fun):
    nth = 0 if fun is listed else None
    address, expected = sg.var(f"{fun.__name__}.x", nth=nth), noted(fun, X)
    assert_close(sg.capture(fun, address)(X)[1][address], expected)


def test_an_edit_reaches_every_execution():
    """The same program with the factor written out."""

    def doubled(x):
        for layer in (mixed, squash, mixed, squash):
            x = (x + layer(x)) * 2.0
        return x

    edited = sg.edit(residual, {sg.var("residual.x"): lambda v: v * 2.0})
    np.testing.assert_allclose(edited(X), doubled(X), rtol=1e-5)


def test_the_gradients_of_every_execution():
    """With h = tanh(x) + 1, y = sin(h) + 1: cos(h) and 1."""
    found = sg.gradients(two_functions, sg.var("two_functions.x"))(X)
    assert_close(found, (np.cos(np.tanh(X) + 1), np.ones(2, np.float32)))


def test_operations_that_return_early():
    for order in itertools.product((0, 1), repeat=3):

        def fun(x, order=order):
            for i in order:
                x = turned(x, i)
            return x

        value, expected = X, []
        for i in order:
            value = np.cos(value) if i else value * np.float32(0.7) + np.float32(0.1)
            expected.append(value)
        address = sg.op("turned")
        assert_close(sg.capture(fun, address)(X)[1][address], tuple(expected))


# -- values that a generator is sent ---


def sent(a):
    s = yield a * 2.0
    yield s * 3.0


def sent_in_a_list(a):
    s = yield [a * 2.0][0]
    yield s * 3.0


def sent_and_added_to(a):
    s = (yield a * 2.0) + 1.0
    yield s * 3.0


def handed_back(a):
    s = yield from sent(a)
    yield s


@pytest.mark.parametrize("made", [sent, sent_in_a_list, sent_and_added_to, handed_back])
def test_what_a_generator_is_sent_is_refused(made):
    def fun(x):
        going = made(x)
        b = next(going)
        return going.send(b * b)

    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        sg.capture(fun, sg.var(f"{made.__name__}.s"))(1.0)
    assert "sent or handed back" in str(caught.value)


def test_what_a_generator_makes_of_it():
    def doubling(a):
        s = 2.0 * (yield a)
        yield s * 3.0

    def fun(x):
        going = doubling(x)
        next(going)
        return going.send(x * 5.0)

    assert sg.capture(fun, sg.var("s"))(1.0)[1][sg.var("s")] == 10.0


# -- random programs ---

HEAD = """
import jax
import jax.numpy as jnp

def dbl(a):
    return a * 0.9

def turned(a, i=0):
    if i % 2:
        return jnp.cos(a)
    r = a * 0.7
    return r + 0.1

class K:
    def __init__(self, k):
        self.k = k
    def __call__(self, a):
        o = a * self.k
        return o if self.k > 0.5 else jnp.sin(o)

"""
FUNCTIONS = "dbl turned K(0.9) K(0.3) jnp.sin jnp.tanh jax.nn.relu".split()
STATEMENTS = (
    "x = s(x)",
    "x = s(x) + x",
    "x = jnp.tanh(s(x))",
    "x += s(u)",
    "x = s(s(x)) * 0.8",
    "x = (x * 0.9 if i % 2 else jnp.cos(x)) + 0.1",
    "x = turned(x, i) * s(u)",
    "x = turned(x, i)",
)


def program(seed):
    """Write a program of loops over functions; each statement is noted."""
    choose = random.Random(seed)
    lines, labels = ["u = x * 0.6"], []
    for k in range(3):
        name = f"v{k}"
        some = ", ".join(choose.choices(FUNCTIONS, k=choose.choice([2, 3, 4])))
        given = choose.choice(STATEMENTS).replace("x", name).replace("ma" + name, "max")
        lines.append(f"{name} = x * 0.{k + 5}")
        lines.append(f"for i, s in enumerate(({some})):")
        lines.append(f"    {given}; note('{name}', {name})")
        if choose.random() < 0.3:
            lines.append(f"    u = u + {name}")
        labels.append(name)
        lines.append(f"x = {name} - x")
    body = textwrap.indent("\n".join([*lines, "return x"]), "    ")
    return f"{HEAD}def fun(x):\n{body}\n", labels


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed, tmp_path):
    text, labels = program(seed)
    file = tmp_path / "random_program.py"
    file.write_text(text)
    values = {label: [] for label in labels}

    def keep(label, value):
        if not isinstance(value, jax.core.Tracer):
            values[label].append(value)

    space = {"note": keep}
    exec(compile(text, str(file), "exec"), space)
    with jax.disable_jit():
        space["fun"](X)
    wanted = {sg.var(f"fun.{k}", nth=1): tuple(v) for k, v in values.items()}
    assert_close(sg.capture(space["fun"], list(wanted))(X)[1], wanted)
