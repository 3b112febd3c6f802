"""A rule that returns another value than its function is told as that, and no kink."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.check as _words

pytestmark = pytest.mark.usefixtures("usual_settings")


def jvp_rule(function, value, slope):
    """A function, what its rule returns instead, and the derivative."""
    custom = jax.custom_jvp(function)
    custom.defjvp(lambda p, t: (value(p[0]), slope(p[0]) * t[0]))
    return custom


def vjp_rule(function, value, slope):
    custom = jax.custom_vjp(function)
    custom.defvjp(lambda x: (value(x), x), lambda x, ct: (ct * slope(x),))
    return custom


def sine(x):
    return jnp.sin(x)


def square(x):
    return x**2


shifted = lambda x: jnp.sin(x) + 1e-3
moved = jvp_rule(sine, shifted, jnp.cos)
doubled = vjp_rule(sine, lambda x: 2 * jnp.sin(x), jnp.cos)
right = jvp_rule(square, square, lambda x: 2 * x)

OTHER = {  # the program, and whether the two numbers are of one call
    "jvp": (lambda x: moved(x) ** 2, True),
    "vjp": (lambda x: doubled(x) ** 2, True),
    "jit": (jax.jit(lambda x: jnp.exp(doubled(x))), True),
    "remat": (jax.checkpoint(lambda x: doubled(x) ** 2), True),
    "vmap": (lambda x: jax.vmap(moved)(x * jnp.ones(1)) ** 2, True),
    "branch": (lambda x: lax.cond(x > 0, moved, jnp.cos, x) ** 2, True),
    "before a right rule": (lambda x: right(doubled(x)), True),
    "beside one that does no harm": (lambda x: doubled(x) ** 2 + 3 * moved(x), True),
    "a loop": (
        lambda x: lax.scan(lambda c, t: (doubled(c) * t, None), x, jnp.arange(1.0, 4))[
            0
        ],
        False,
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_rule_with_another_value_is_named(name):
    function, is_one = OTHER[name]
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(0.5)
    first, second, write = str(caught.value).split("\n")
    assert "the rule of sine (tests/test_check_values.py:" in first
    assert second == "  so what comes after it is differentiated at another value"
    numbers = re.findall(r": (\S+) by the function, (\S+) by the rule$", first)
    if is_one:
        ((own, told),) = numbers
        other = 2 * np.sin(0.5) if "moved" not in name else shifted(0.5)
        assert float(own) == pytest.approx(np.sin(0.5), rel=1e-5)
        if name in ("jvp", "vmap", "branch"):
            other = np.sin(0.5) + 1e-3
        assert float(told) == pytest.approx(other, rel=1e-5)
    else:
        assert first.endswith(_words.WRONG_VALUE.partition("} ")[2])
    for false in ("kink", "wrong derivative", "is not the derivative"):
        assert false not in str(caught.value)
    (allow,) = re.findall(r"allow=\[\"(.*)\"\], if it differs on purpose", write)
    sg.check_gradients(function, allow=[allow])(0.5)


def test_in_forward_mode():
    function = lambda x: moved(x) ** 2
    with pytest.raises(AssertionError, match=r"the rule of sine .* returns another"):
        sg.check_gradients(function, modes=("fwd",))(0.5)
    step = lambda c: (c[0] + 1, moved(c[1]) ** 2 + 1)
    looped = lambda x: lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]
    with pytest.raises(AssertionError, match=r"the rule of sine .* returns another"):
        sg.check_gradients(looped, modes=("fwd",))(0.5)


def test_of_many_entries_that_which_is_farthest_off():
    x = jnp.linspace(0.0, 1.0, 30)
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(lambda x: jnp.sum(doubled(x) ** 2))(x)
    said = _words.VALUES.format(own=f"{np.sin(1):.6g}", told=f"{2 * np.sin(1):.6g}")
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(value):
    broken = vjp_rule(sine, lambda x: jnp.sin(x) + value, jnp.cos)
    for function in (lambda x: broken(x) ** 2, broken, lambda x: jnp.exp(-broken(x))):
        with pytest.raises(
            AssertionError, match=r"the rule of sine .* returns another"
        ):
            sg.check_gradients(function)(0.5)
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(broken)(0.5)
    assert f"by the function, {value} by the rule" in str(caught.value)


RIGHT = {
    "of which a derivative is the same": lambda x: 3 * doubled(x),
    "that is rounded otherwise": lambda x: (
        vjp_rule(sine, lambda x: jnp.sin(x) * (1 + 1e-6), jnp.cos)(x) ** 2
    ),
    "that is stopped": lambda x: lax.stop_gradient(doubled(x)) * x,
    "that is not used": lambda x: (doubled(x), x**2)[1],
    "inside a rule": lambda x: vjp_rule(
        lambda x: doubled(x) ** 2,
        lambda x: jnp.sin(x) ** 2,
        lambda x: 2 * jnp.sin(x) * jnp.cos(x),
    )(x),
    "infinite for both": lambda x: jnp.where(
        x > 0, x**2, vjp_rule(lambda x: x - jnp.inf, lambda x: x - jnp.inf, jnp.cos)(x)
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_value_that_does_no_harm_is_not_told(name):
    sg.check_gradients(RIGHT[name], order=1)(0.5)


@jax.custom_vjp
def with_residuals(x):
    """Its second result is for the backward pass, and only filled there."""
    return jnp.sin(x), jnp.zeros(2)


with_residuals.defvjp(
    lambda x: ((jnp.sin(x), jnp.stack([x, x])), x),
    lambda x, cts: (jnp.cos(x) * cts[0],),
)


def test_results_that_are_for_the_backward_pass():
    sg.check_gradients(lambda x: with_residuals(x)[0] ** 2)(0.5)
    wrong = vjp_rule(square, square, lambda x: 3 * x)
    with pytest.raises(AssertionError, match=r"the rule of square .* is not the deriv"):
        sg.check_gradients(lambda x: with_residuals(x)[0] ** 2 + wrong(x))(0.5)


def test_a_wrong_rule_behind_another_value_is_wrong():
    wrong = jvp_rule(square, square, lambda x: 3 * x)
    with pytest.raises(AssertionError, match=r"the rule of square .* is not the") as e:
        sg.check_gradients(lambda x: wrong(doubled(x)))(0.5)
    true = 2 * np.sin(0.5) * np.cos(0.5)  # at the value of the function
    (told,) = re.findall(r": (\S+) by differences", str(e.value))
    assert float(told) == pytest.approx(true, rel=1e-3)


def test_a_kink_beside_another_value_has_its_own_slopes():
    function = lambda x: moved(x) ** 2 + jnp.abs(x[0] - 0.5)
    with pytest.raises(AssertionError, match="the point is at a kink") as caught:
        sg.check_gradients(lambda x: jnp.sum(function(x)))(f32(0.5))
    slopes = re.findall(r"slope (\S+) on one side, (\S+) on", str(caught.value))
    smooth = np.sin(1.0)
    assert [float(x) for x in slopes[0]] == pytest.approx(
        [smooth - 1, smooth + 1], abs=0.01
    )
