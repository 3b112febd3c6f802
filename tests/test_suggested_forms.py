"""What an error says to write is pasted as it stands, and means what was asked for.

Names with the modules of JAX in front, arguments that share a name with a point, and
attributes.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X = f32(0.3, -0.7, 1.1)
FORM = r'sg\.(?:op|var|point)\((?:[^()]|\([^()]*\))*\)|"[^"]*"|\b\d+\b'


def refused(fun, address, *args, **kwargs):
    """Return what came, and each form of the last beat as it is to be pasted."""
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(fun, address)(*args, **kwargs)
    got, _, write = (
        str(caught.value).partition("\n  got:   ")[2].partition("\n  write: ")
    )
    return got, [eval(form, {"sg": sg}) for form in re.findall(FORM, write)]


def value(fun, address, *args, **kwargs):
    return sg.capture(fun, address)(*args, **kwargs)[1][address]


# Names with modules in front --------------------------------------------------------


def activated(x):
    return jnp.sum(jax.nn.gelu(x) + jax.nn.sigmoid(x) * jnp.maximum(x, 0.5))


def largest(x):
    return jnp.max(jnp.maximum(x, 0.5))


def layered(x):
    return activated(x) + jax.jit(jnp.tanh)(x).sum()


@pytest.mark.parametrize(
    ("fun", "name", "write"),
    [
        (activated, "jax.nn.gelu", "gelu"),
        (activated, "flax.linen.gelu", "gelu"),
        (activated, "nn.gelu", "gelu"),
        (activated, "jax.nn.sigmoid", "sigmoid"),
        (activated, "jax.lax.logistic", "logistic"),
        (activated, "jnp.maximum", "maximum"),
        (activated, "jax.numpy.sum", "sum"),
        (layered, "jax.numpy.tanh", "tanh"),
        (layered, "models.activated", "activated"),
        (jax.nn.gelu, "jax.nn.gelu", "gelu"),
        (largest, "jax.lax.max", "max"),
        # The primitive "max" is not `jnp.max`.
        (largest, "jax.numpy.max", "reduce_max"),
        (largest, "jnp.max", "reduce_max"),
    ],
)
@pytest.mark.parametrize("as_string", [False, True], ids=["op", "string"])
def test_modules_in_front(fun, name, write, as_string):
    _, forms = refused(fun, name if as_string else sg.op(name), X)
    assert forms == [sg.op(write)]
    value(fun, forms[0], X)


def test_the_value_of_what_is_suggested():
    for name, expected in (
        ("jax.nn.gelu", jax.nn.gelu(X)),
        ("jax.nn.sigmoid", 1.0 / (1.0 + np.exp(-X))),
        ("jax.numpy.maximum", np.maximum(X, np.float32(0.5))),
    ):
        _, (form,) = refused(activated, sg.op(name), X)
        np.testing.assert_allclose(value(activated, form, X), expected, rtol=1e-6)
    _, (form,) = refused(largest, sg.op("jax.numpy.max"), X)
    np.testing.assert_allclose(value(largest, form, X), np.float32(1.1))


def test_the_rest_of_the_address_is_kept_where_it_can_be():
    twice = lambda x: jax.nn.gelu(x) + jax.nn.gelu(2.0 * x)
    for address, write in (
        (sg.op("jax.nn.gelu", nth=1), sg.op("gelu", nth=1)),
        (sg.op("jax.nn.gelu", nth=2), sg.op("gelu")),
        (sg.op("jax.nn.gelu", within="encoder"), sg.op("gelu")),
    ):
        assert refused(twice, address, X)[1] == [write]
        value(twice, write, X)
    both = sg.op(("jax.nn.gelu", "jax.nn.sigmoid", "jax.nn.elu"))
    assert refused(activated, both, X)[1] == [sg.op(("gelu", "sigmoid"))]
    inside = sg.op("tanh", within="jax.nn.gelu")
    assert refused(activated, inside, X)[1][0] == sg.op("tanh", within="gelu")


@pytest.mark.parametrize(
    "name",
    [
        "jax.nn.silu",
        "silu",
        "jax.lax.sin",
        "jax.numpy.max",
        "jax.random.logistic",
        "a.",
    ],
)
def test_what_is_not_there_is_not_said_to_be_the_whole_or_a_namesake(name):
    _, forms = refused(activated, sg.op(name), X)
    not_meant = {"activated", name.rpartition(".")[2]}
    assert forms
    assert not not_meant & {form.name for form in forms}
    for form in forms:
        value(activated, form, X)


def test_of_a_function_that_is_all_there_is_nothing_is_suggested():
    def nothing(x):
        return {"x": x}

    with pytest.raises(sg.AddressError, match="write: another function"):
        sg.capture(nothing, sg.op("jax.nn.gelu"))(X)


@pytest.mark.parametrize("name", ["max", "min"])
def test_a_name_of_a_primitive_and_of_a_function_that_is_none(name):
    made = jax.make_jaxpr(getattr(jnp, name))(X).eqns
    assert f"reduce_{name}" in str(made)
    assert f"= {name} " not in str(made)


# An argument and a point of one name --------------------------------------------------


def both(x):
    return jnp.sum(sg.name(jnp.sin(x), "x"))


def inner(x):
    return jnp.sum(jnp.tanh(x))


def handed(w, x):
    return inner(x * w) + jnp.sum(sg.name(jnp.sin(x), "x"))


def other_name(w, x):
    h = x
    return jnp.sum(sg.name(jnp.sin(h * w), "x"))


def nested(params, x):
    return jnp.sum(sg.name(params["w"] * x, "params/w"))


@pytest.mark.parametrize(
    ("fun", "args", "address", "write"),
    [
        (both, (X,), sg.var("x"), [0, sg.point("x")]),
        (both, (X,), "x", [sg.point("x"), 0]),
        (both, (X,), "x/0", [0]),
        (handed, (2.0, X), sg.var("x"), [sg.var("inner.x"), 1, sg.point("x")]),
        (handed, (2.0, X), "x", [sg.point("x"), 1]),
        (other_name, (2.0, X), sg.var("h"), [1]),
        (nested, ({"w": X}, X), "params/w", [sg.point("params/w"), "0/w"]),
    ],
)
def test_an_argument_and_a_point_of_one_name(fun, args, address, write):
    _, forms = refused(fun, address, *args)
    assert forms == write
    for form in forms:
        found = value(fun, form, *args)
        if repr(form).startswith("sg.point"):
            told = args[-1] * X if fun is nested else np.sin(X)
        else:
            told = X * 2.0 if form == sg.var("inner.x") else X
        np.testing.assert_allclose(found, told, rtol=1e-6)


def test_no_position_is_said_where_there_is_none():
    def by_name(*, x):
        return both(x)

    for address in ("x", sg.var("by_name.x")):
        _, forms = refused(by_name, address, x=X)
        assert forms == [sg.point("x")]
        np.testing.assert_allclose(value(by_name, forms[0], x=X), np.sin(X), rtol=1e-6)
    assert refused(both, "x", x=X)[1] == [sg.point("x")]


def test_a_parameter_that_is_filled_is_no_argument():
    filled = functools.partial(handed, x=X)
    for fun in (filled, functools.partial(both, X)):
        args = (2.0,) if fun is filled else ()
        _, forms = refused(fun, sg.var(f"{fun.func.__name__}.x"), *args)
        assert not {0, 1, "x"} & set(forms)


def test_gradients_take_what_is_suggested():
    for form, told in zip(
        refused(both, sg.var("x"), X)[1], (np.cos(X), 1.0), strict=True
    ):
        found = sg.gradients(both, form)(X)
        np.testing.assert_allclose(found, told * np.ones(3), rtol=1e-6)


# Attributes ---------------------------------------------------------------------------


class Layer:
    def __call__(self, x):
        self.h = jnp.sin(x)
        self.same = x
        return jnp.sum(self.h)


class Twice:
    def __call__(self, x):
        self.h = jnp.cos(x)
        self.h = jnp.exp(self.h)
        return jnp.sum(self.h)


class Cell:
    pass


def kept(x):
    cell = Cell()
    cell.state = jnp.tanh(x)
    return cell.state


def of_layer(x):
    return Layer()(x)


def of_both_layers(x):
    return Layer()(x) + Twice()(x)


FIRST, SECOND = np.cos(X), np.exp(np.cos(X))


@pytest.mark.parametrize(
    ("fun", "listed"),
    [
        (of_layer, ["self.h"]),
        (lambda x: kept(x), ["cell.state"]),
        (lambda x: Layer()(x) + kept(x), ["self.h", "cell.state"]),
    ],
)
def test_attributes_are_listed_as_they_are_addressed(fun, listed):
    got, _ = refused(fun, sg.var("nothing"), X)
    names = re.findall(r'"([^"]*)"', got)
    assert [n for n in names if "." in n] == listed
    told = {"self.h": np.sin(X), "cell.state": np.tanh(X)}
    for name in listed:
        found = value(fun, sg.var(name), X)
        np.testing.assert_allclose(found, told[name], rtol=1e-6)


def test_none_is_not_said_of_attributes_without_an_address():
    class Only:
        def __call__(self, x):
            self.h = x
            return jnp.sum(x * 2.0)

    got, _ = refused(lambda x: Only()(x), sg.var("nothing"), X)
    assert '"' not in got


@pytest.mark.parametrize(
    ("fun", "label", "told"),
    [
        (of_layer, "h", [np.sin(X)]),
        (of_layer, "Layer.h", [np.sin(X)]),
        (lambda x: Twice()(x), "h", [FIRST, FIRST, SECOND, SECOND]),
        (lambda x: kept(x), "state", [np.tanh(X)]),
        (lambda x: kept(x), "kept.state", [np.tanh(X)]),
        (of_both_layers, "h", [np.sin(X)]),
    ],
)
def test_an_attribute_by_its_last_name(fun, label, told):
    got, forms = refused(fun, sg.var(label), X)
    assert f".{label.rpartition('.')[2]}, in " in got
    assert len(forms) == len(told)
    for form, expected in zip(forms, told, strict=True):
        np.testing.assert_allclose(value(fun, form, X), expected, rtol=1e-6)


def test_an_attribute_by_its_last_name_as_a_string():
    for fun, label, told in ((of_layer, "h", np.sin), (kept, "state", np.tanh)):
        _, forms = refused(fun, label, X)
        assert forms
        for form in forms:
            np.testing.assert_allclose(value(fun, form, X), told(X), rtol=1e-6)


def test_a_variable_of_another_function_in_several_statements():
    def model(x):
        h = jnp.cos(x)
        h = jnp.exp(h)
        return h

    _, forms = refused(model, sg.var("modle.h"), X)
    assert len(forms) == 4
    for form, told in zip(forms, (FIRST, FIRST, SECOND, SECOND), strict=True):
        np.testing.assert_allclose(value(model, form, X), told, rtol=1e-6)
