"""`check_gradients` where results, or what is beside the point, are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.check as _words

X = f32(0.4, -0.7, 1.2)
KEEP = jnp.array([True, False, True])
pytestmark = pytest.mark.usefixtures("usual_settings")


def rule(function, slope, by=1.0):
    """A function with a rule that is `by` times right."""
    custom = jax.custom_vjp(function)
    custom.defvjp(lambda x: (function(x), x), lambda x, ct: (ct * by * slope(x),))
    return custom


def jvp_rule(function, slope, by):
    """The same for both modes."""
    custom = jax.custom_jvp(function)
    custom.defjvp(lambda p, t: (function(p[0]), by * slope(p[0]) * t[0]))
    return custom


# Results that are not finite ----------------------------------------------------------

PARTLY = {
    "masked softmax": lambda x: jax.nn.log_softmax(jnp.where(KEEP, x, -jnp.inf)),
    "masked": lambda x: jnp.where(KEEP, x**2, -jnp.inf),
    "a constant": lambda x: (x.sum() ** 2, jnp.inf),
    "a constant nan": lambda x: (x.sum() ** 2, jnp.log(-jnp.ones(2))),
    "overflows": lambda x: (jnp.sin(x), jnp.exp(1000 + 0 * lax.stop_gradient(x))),
    "of a stop": lambda x: (x**2, jnp.log(lax.stop_gradient(x))),
    "in a scan": lambda x: lax.scan(
        lambda c, x: (jnp.sin(c) * x, jnp.where(x > 0, c, jnp.nan)), jnp.float32(1), x
    ),
}


@pytest.mark.parametrize("name", PARTLY)
def test_entries_that_are_not_finite_are_left_out(name):
    function = PARTLY[name]
    outs = jax.tree.leaves(function(X))
    assert not all(np.isfinite(out).all() for out in outs)
    sg.check_gradients(function, order=2, modes=("rev", "fwd"))(X)


@pytest.mark.parametrize("name", PARTLY)
@pytest.mark.parametrize("modes", [("rev",), ("fwd",)], ids=["rev", "fwd"])
def test_and_a_wrong_rule_is_found_beside_them(name, modes):
    wrong = jvp_rule(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2, 1.01)
    with pytest.raises(AssertionError, match=r"rule of <lambda> .* is not the deriv"):
        sg.check_gradients(lambda x: PARTLY[name](wrong(x) * 2), modes=modes)(X)


def test_also_of_many_entries():
    even = jnp.arange(100) % 2 == 0
    x = jnp.linspace(-2, 2, 100)
    masked = lambda f: lambda x: jnp.where(even, f(x), -jnp.inf)
    sg.check_gradients(masked(jnp.square), order=2, modes=("rev", "fwd"))(x)
    wrong = rule(jnp.square, lambda x: 2 * x, 1.01)
    with pytest.raises(AssertionError, match="the rule of <lambda>"):
        sg.check_gradients(masked(wrong))(x)


@pytest.mark.parametrize("function", [lambda x: jnp.log(-(x**2)), lambda x: x / 0])
def test_where_nothing_is_finite_that_is_said(function):
    expected, came, _ = _words.NOTHING_FINITE
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(X)
    assert expected in str(caught.value)
    assert came in str(caught.value)
    assert "write: sg.find_nonfinite(<lambda>)(...)" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_zero_that_meets_an_infinite_slope_is_told_and_nobody_is_accused():
    """JAX's reverse mode makes nan of it; its forward mode does not."""
    at = f32(1.0, 0.0, 2.0)
    assert np.isnan(jax.grad(lambda x: jnp.log(x)[0])(at)[1])
    own = rule(jnp.log, lambda x: 1 / x)
    for function in (jnp.log, own):
        with pytest.raises(AssertionError) as caught:
            sg.check_gradients(function)(at)
        said = _words.LEFT_OUT.split("{told}")[1]
        assert "the derivative by x[1] (rev)" in str(caught.value)
        assert f"is nan{said}" in str(caught.value)
    sg.check_gradients(jnp.log, modes=("fwd",))(at)
    with pytest.raises(AssertionError, match=r"the rule of <lambda>(.|\n)*by x\[0\]"):
        sg.check_gradients(rule(jnp.log, lambda x: 1 / x, 2.0))(at)


# One entry of many --------------------------------------------------------------------


@pytest.mark.parametrize("summed", [False, True], ids=["each", "sum"])
def test_one_wrong_entry_of_many_is_found(summed):
    """Along a random direction, weighed at random, none hides: the weakest are seen."""
    x = jnp.linspace(0.1, 1, 100)

    def check(places, factor):
        slope = lambda x: jnp.cos(x).at[places].multiply(factor)
        wrong = rule(jnp.sin, slope)
        function = (lambda x: jnp.sum(wrong(x))) if summed else wrong
        with pytest.raises(AssertionError, match="the rule of <lambda>") as caught:
            sg.check_gradients(function)(x)
        assert "kink" not in str(caught.value)  # a sine has none
        return caught.value

    error = check(jnp.arange(100), 2.0)
    parts = np.abs(np.asarray(error.direction) * np.cos(x))
    if not summed:
        parts *= np.abs(np.asarray(error.weights[0]))
    weakest = np.argsort(parts)[:3]
    assert parts[weakest[0]] > 0.02 * np.mean(parts)
    for place, factor in zip(weakest, (1.5, 0.0, -1.0), strict=True):
        check(place, factor)


# The border of a domain ---------------------------------------------------------------

POWER = lambda x: x**1.5
SETTLED = {  # JAX's derivative is that of the side where the function is defined
    "power": (POWER, f32(0.0, 1.0)),
    "power of a sum": (lambda x: jnp.sum(x**1.5), f32(0.0, 1.0, 2.0)),
    "scalar": (lambda x: x**2.5, f32(0.0)[0]),
    "linear": (lambda x: jnp.where(x < 0, jnp.nan, 3 * x), f32(0.0, 1.0)),
    "two borders": (lambda x: x**1.5 + (1 - x) ** 2.5, f32(0.0, 1.0)),
    "many entries": (lambda x: jnp.sum(x**1.5), jnp.arange(100.0) % 10),
    "entropy": (jax.scipy.special.entr, f32(0.0, 0.5)),  # inf at zero
    "root": (jnp.sqrt, f32(0.0, 1.0)),  # inf, too
    "both sides": (jnp.cbrt, f32(0.0, 1.0)),
}


@pytest.mark.parametrize("name", SETTLED)
def test_at_a_border_the_side_that_is_finite_tells(name):
    function, x = SETTLED[name]
    sg.check_gradients(function)(x)
    with jax.enable_x64(True):
        sg.check_gradients(function)(x.astype("float64"))


def off(x):
    return 1.5 * x**0.5 + 0.3


UNSETTLED = {
    "off by a term": (rule(POWER, off), "on one side of it: ", "0.3 by JAX"),
    "nan": (lambda x: x * jnp.sqrt(x), "on one side of it: ", "nan by JAX"),
    "infinite": (rule(POWER, lambda x: x / 0 + jnp.inf), "on one side of it", "by JAX"),
    "finite where it diverges": (
        rule(jnp.sqrt, lambda x: x + 2.0),
        "on one side of it: inf by differences, ",
        "2 by JAX",
    ),
    "on no side": (
        lambda x: jnp.where(x == 0, x, jnp.nan),
        "on either side of it: ",
        "1 by JAX",
    ),
}


@pytest.mark.parametrize("name", UNSETTLED)
def test_what_a_border_does_not_settle_is_told_and_nobody_is_accused(name):
    function, where, told = UNSETTLED[name]
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(0.0)
    message = str(caught.value)
    assert "the point is at the border of a domain, as the function is" in message
    assert f"not finite {where}" in message
    assert told in message
    assert f"write: {_words.INSIDE}" in message
    assert "wrong" not in message
    assert "the rule of" not in message


def test_the_border_of_a_derivative_is_told_at_second_order():
    """That of a root is infinite at zero, so its differences are nothing."""
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(jnp.sqrt, order=2)(0.0)
    assert "as the derivative is not finite at it: -inf by JAX" in str(caught.value)


def test_a_wrong_rule_is_found_inside():
    wrong = rule(POWER, lambda x: 1.6 * x**0.5)
    with pytest.raises(AssertionError, match=r"the rule of <lambda>(.|\n)*by x\[1\]"):
        sg.check_gradients(wrong)(f32(0.0, 1.0))


def test_a_derivative_that_is_infinite_must_be_so_on_both_sides():
    infinite = rule(jnp.sin, lambda x: x + jnp.inf)
    with pytest.raises(AssertionError, match=r"the rule of .* is not the derivative"):
        sg.check_gradients(infinite)(0.5)
    with pytest.raises(AssertionError, match=r"wrong derivative .* inf by JAX"):
        sg.check_gradients(infinite, allow=["<lambda>"], order=2)(0.5)


# Many entries, some of them where something is not finite -----------------------------

SCALED = jnp.linspace(1.0, 2.0, 20)
BESIDE = {  # a function, its slope, and a number where it is at a border or is steep
    "infinite slope": (jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x), 0.0),
    "border": (lambda x: x**1.5, lambda x: 1.5 * jnp.sqrt(x), 0.0),
    "other border": (lambda x: (3 - x) ** 1.5, lambda x: -1.5 * jnp.sqrt(3 - x), 3.0),
    "inside": (jnp.cbrt, lambda x: 1 / (3 * jnp.cbrt(x) ** 2), 0.0),
}


@pytest.mark.parametrize("places", [(0,), range(0, 20, 2)], ids=["one", "ten"])
@pytest.mark.parametrize("name", BESIDE)
def test_steep_entries_hide_no_wrong_rule_and_accuse_no_right_one(name, places):
    function, slope, steep = BESIDE[name]
    x = SCALED.at[jnp.array(places)].set(steep)
    summed = lambda f: lambda x: jnp.sum(f(x))
    sg.check_gradients(rule(function, slope))(x)
    sg.check_gradients(summed(jvp_rule(function, slope, 1.0)))(x)
    for wrong in (rule(function, slope, 1.2), summed(jvp_rule(function, slope, 1.2))):
        with pytest.raises(AssertionError, match="the rule of <lambda>"):
            sg.check_gradients(wrong)(x)


@pytest.mark.parametrize("name", BESIDE)
def test_nor_a_wrong_derivative_of_another_leaf(name):
    function, slope, steep = BESIDE[name]
    x = SCALED.at[4].set(steep)
    wrong = rule(function, lambda x: slope(x) * jnp.where(jnp.arange(20) == 7, 2, 1))
    with pytest.raises(AssertionError, match="the rule of"):
        sg.check_gradients(lambda w, x: jnp.sum(w * wrong(x)))(SCALED, x)
