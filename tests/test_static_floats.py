"""A float that a jitted function declares static is one; others are traced."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X = f32(1.0, 2.0)


def power(x, p, q=1.0):
    assert isinstance(p, float)
    return q * jnp.sum(x**p)


by_name = jax.jit(power, static_argnames="p")
by_number = jax.jit(power, static_argnums=1)
from_the_end = jax.jit(lambda x, p: power(x, p), static_argnums=-1)
of_several = jax.jit(lambda *xs: power(*xs), static_argnums=-1)
of_a_tuple = jax.jit(lambda x, ps: power(x, ps[0]) + len(ps), static_argnames="ps")
CALLS = {
    "by name": (by_name, (X, 3.0), {}),
    "by number": (by_number, (X, 3.0), {}),
    "by keyword": (by_name, (X,), {"p": 3.0}),
    "by number, by keyword": (by_number, (X,), {"p": 3.0}),
    "from the end": (from_the_end, (X, 3.0), {}),
    "of several": (of_several, (X, 3.0), {}),
    "a tuple": (of_a_tuple, (X, (3.0, 2)), {}),
    "a number of NumPy": (
        jax.jit(lambda x, p: jnp.sum(x ** float(p)), static_argnums=1),
        (X, np.float32(3.0)),
        {},
    ),
    "bound": (functools.partial(by_name, q=1.0), (X, 3.0), {}),
    "bound first": (
        functools.partial(jax.jit(lambda k, x, p: power(x, p), static_argnums=2), 0.5),
        (X, 3.0),
        {},
    ),
}


@pytest.mark.parametrize(("fun", "args", "kwargs"), CALLS.values(), ids=CALLS)
def test_a_static_float(fun, args, kwargs):
    (gradient,) = sg.gradients(fun, [0])(*args, **kwargs)
    np.testing.assert_allclose(gradient, 3 * np.float32([1, 4]), rtol=1e-6)
    assert not sg.flow(fun)(*args, **kwargs).cuts
    assert sg.find_nonfinite(fun)(*args, **kwargs) is None
    sg.check_gradients(fun)(*args, **kwargs)


def test_another_float_of_it_is_traced():
    dx, dq = sg.gradients(by_name, ["x", "q"])(X, 3.0, 2.0)
    np.testing.assert_allclose(dx, 6 * np.float32([1, 4]), rtol=1e-6)
    np.testing.assert_allclose(dq, 9.0)


def inner(x, p):
    return by_name(x, p)


def first(p, x):
    return by_name(x, p)


def middle(x, p, scale):
    return scale * by_name(x, p)


INNER = [
    (inner, (X, 3.0), {}),
    (inner, (X,), {"p": 3.0}),
    (first, (3.0, X), {}),
    (middle, (X, 3.0, 2), {}),
]


@pytest.mark.parametrize(("fun", "args", "kwargs"), INNER)
@pytest.mark.parametrize("verb", [lambda f: sg.gradients(f, "x"), sg.flow])
def test_of_a_function_inside_it_is_said_how_to_bind_it(verb, fun, args, kwargs):
    """What is printed, pasted in, is right."""
    with pytest.raises(ValueError, match="Python floats are traced") as caught:
        verb(fun)(*args, **kwargs)
    assert "Tracer" not in str(caught.value)
    (written,) = re.findall("write: (.*)", str(caught.value))
    bound = eval(written, globals())
    rest = [x for x in args if not isinstance(x, float)]
    gradient = sg.gradients(bound, "x")(*rest)
    scale = args[2] if fun is middle else 1
    np.testing.assert_allclose(gradient, scale * 3 * np.float32([1, 4]), rtol=1e-6)


def test_an_array_that_is_static_is_refused_by_jax():
    with pytest.raises(ValueError, match="Non-hashable static arguments"):
        sg.gradients(by_name, "x")(X, jnp.float32(3.0))


def of_a_tree(config, x):
    return by_name(x, config["p"])


def of_any(*args):
    return by_name(*args)


@pytest.mark.parametrize(
    ("fun", "args"), [(of_a_tree, ({"p": 3.0}, X)), (of_any, (X, 3.0))]
)
def test_what_cannot_be_written_down_is_told_without_it(fun, args):
    with pytest.raises(ValueError, match=r"write: functools.partial or a lambda"):
        sg.gradients(fun, [1 if fun is of_a_tree else 0])(*args)


def test_another_error_of_a_static_argument_is_left_as_it_is():
    """Not the float is static here: the array is, and JAX says so."""
    with pytest.raises(ValueError, match="Non-hashable static arguments"):
        sg.gradients(lambda x, scale: scale * by_name(1.0, x), "x")(X, 2.0)
