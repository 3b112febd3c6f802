"""What the numbers of `check_gradients(order=2)` are second derivatives of."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.check as _words

pytestmark = pytest.mark.usefixtures("usual_settings")


@jax.custom_jvp
def cube(x):
    """Its first derivative is right, and that one has none."""
    return x**3


cube.defjvp(lambda p, t: (cube(p[0]), 3 * jax.lax.stop_gradient(p[0]) ** 2 * t[0]))


def checked(function, *args, **options):
    """Return the error of a check of second order, and both of its numbers."""
    with pytest.raises(AssertionError, match="second order") as caught:
        sg.check_gradients(function, order=2, **options)(*args)
    numbers = re.findall(r": (\S+) by differences, (\S+) by JAX", str(caught.value))
    ((true, told),) = numbers
    return caught.value, float(true), float(told)


@pytest.mark.parametrize("mode", ["rev", "fwd"])
@pytest.mark.parametrize("x", [0.7, -30.0, 0.002])
def test_of_one_number_it_is_the_second_derivative(x, mode):
    for shape in ((), (1,)):
        at = jnp.full(shape, x)
        error, true, told = checked(lambda x: jnp.sum(cube(x)), at, modes=(mode,))
        assert true == pytest.approx(6 * x, rel=1e-3)
        assert told == 0
        assert _words.OF_SLOPE not in str(error)
        assert not vars(error)


def test_of_several_results_it_is_that_of_their_weighed_sum():
    error, true, told = checked(lambda x: cube(x) * f32(1, 2), jnp.float32(0.7))
    assert true == pytest.approx(4.2 * float(error.weights[0] @ f32(1, 2)), rel=1e-3)
    assert told == 0
    assert not hasattr(error, "first_directions")


def test_of_a_few_numbers_it_is_of_the_slope_along_all_of_them():
    x, y = f32(0.7, 1.1), jnp.float32(2.0)
    function = lambda x, y: jnp.sum(cube(x)) * y
    error, true, told = checked(function, x, y)
    assert _words.OF_SLOPE in str(error)
    assert "by x[0]" in str(error)
    along_x, along_y = error.first_directions
    assert along_x.shape == x.shape
    assert along_y.shape == y.shape
    mixed = 3 * x[0] ** 2 * along_y
    assert true == pytest.approx(float(6 * x[0] * y * along_x[0] + mixed), rel=1e-3)
    assert told == pytest.approx(float(mixed), rel=1e-3)


def test_of_many_numbers_it_is_of_two_directions():
    x = jnp.linspace(0.7, 1.1, 20)
    error, true, told = checked(lambda x: jnp.sum(cube(x)), x)
    assert _words.ALONG in str(error)
    assert _words.OF_SLOPE in str(error)
    (first,) = error.first_directions
    expected = float(np.sum(6 * x * first * error.direction))
    assert true == pytest.approx(expected, rel=1e-3)
    assert told == 0


def test_first_derivatives_are_of_no_other_slope():
    wrong = sg.with_backward(jnp.sin, lambda ct, out, x: (ct,))
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(wrong, order=2)(f32(0.5, 1.0))
    assert not hasattr(caught.value, "first_directions")


def halved(z, end):
    """Quantized in 255 steps, of which 0.3 is in the middle between two."""
    scale = end / 255
    return z / scale + jax.lax.stop_gradient(jnp.round(z / scale) - z / scale)


@pytest.mark.parametrize("factor", [1.0, 50.0])
@pytest.mark.parametrize(
    "quantized",
    [
        lambda z, end: sg.quantize.fake_quant(z, -end / 3, 2 * end / 3),
        lambda z, end: halved(z, end) * (end / 255),
        lambda z, end: sg.straight_through(jnp.round)(z / (end / 255)) * (end / 255),
    ],
)
def test_at_a_tie_both_round_alike(quantized, factor):
    """XLA divides by constants otherwise than by operands."""
    f = lambda z, end: jnp.sum(jnp.sin(factor * quantized(z, end)))
    sg.check_gradients(f, order=2)(f32(0.3), np.float32(3.0))


def test_at_a_tie_a_wrong_one_is_accused():
    f = lambda z, end: jnp.sum(cube(halved(z, end) * (end / 255)))
    checked(f, f32(0.3), np.float32(3.0))
