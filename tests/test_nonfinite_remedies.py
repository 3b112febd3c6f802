"""What `find_nonfinite` says to write is right as it is printed."""

import jax
import jax.numpy as jnp
import nonfinite_remedies as cases
import numpy as np
import pytest
from as_printed import mended, remedy
from nonfinite_remedies import EDITED, TOLD
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
NAME = lambda x: x.__name__ if callable(x) else "x".join(map(str, x.shape))
W = jnp.float32(1.5)


def slope(function, x):
    """Differences of the value, which is finite, in float64."""
    with jax.enable_x64(True):
        w, x, h = jnp.float64(W), jnp.asarray(x, jnp.float64), 1e-6
        return (function(w + h, x) - function(w - h, x)) / (2 * h)


@pytest.mark.parametrize(("function", "x"), EDITED, ids=NAME)
def test_an_edit_that_is_printed_does(function, x, run):
    assert np.isfinite(function(W, x))
    assert np.isnan(jax.grad(function)(W, x))
    edited = mended(function, sg.find_nonfinite(run(function))(W, x))
    np.testing.assert_allclose(edited(W, x), function(W, x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(edited)(W, x), slope(function, x), rtol=1e-5)
    assert sg.find_nonfinite(edited)(W, x) is None


@pytest.mark.parametrize(("function", "x"), TOLD, ids=NAME)
def test_without_an_edit_the_cause_is_told(function, x):
    assert np.isfinite(function(W, x))
    assert np.isnan(jax.grad(function)(W, x))
    report = sg.find_nonfinite(function)(W, x)
    assert remedy(report) is None
    assert "slope" in report.hint or "before it is used, too" in report.hint


@pytest.mark.parametrize("function", [cases.example, cases.example_of_rows], ids=NAME)
@pytest.mark.parametrize("axis", [0, 1])
def test_axes_that_vmap_adds_are_not_printed(function, axis):
    """`keep[:, None]` has one axis too many for the author of the function."""
    many = cases.ROWS if function is cases.example else jnp.stack([cases.ROWS] * 3)
    mapped = lambda w, x: jnp.sum(jax.vmap(function, (None, axis))(w, x))
    report = sg.find_nonfinite(mapped)(W, jnp.moveaxis(many, 0, axis))
    assert remedy(report) is None
    assert "Mask w * x before it is used, too" in report.hint


def test_an_edit_by_entries_is_printed_under_vmap():
    function = cases.example_by_entries
    over = lambda f: lambda w, x: jnp.sum(jax.vmap(f, (None, 0))(w, x))
    edited = mended(function, sg.find_nonfinite(over(function))(W, cases.ROWS))
    np.testing.assert_allclose(
        jax.grad(over(edited))(W, cases.ROWS),
        slope(over(function), cases.ROWS),
        rtol=1e-5,
    )


def test_a_row_that_is_masked_as_a_whole():
    x = f32(1.0, 2.0, 0.5)
    report = sg.find_nonfinite(cases.attention_full)(W, x)
    assert report.expression == "jax.nn.softmax(s, -1)"
    assert "no largest number to subtract" in report.hint
    edited = mended(cases.attention_full, report)
    assert "counts all its entries alike" in report.hint
    np.testing.assert_allclose(edited(W, x), x.sum(), rtol=1e-6)  # 3 rows of means
    assert jax.grad(edited)(W, x) == 0.0


def test_the_nan_of_a_sum_is_not_blamed_on_its_infinity():
    report = sg.find_nonfinite(cases.minus_largest)(W, cases.ENTRY)
    assert report.expression == "s.at[0].set(w) - s.max()"
    assert report.primitive == "sub"
    assert report.hint == "infinities of the same sign are subtracted"


# The numbers that one is asked for ----------------------------------------------------


def log_of(x):
    return jnp.sum(jnp.log(x - 1.0))


def reciprocal(x):
    return jnp.sum(3.0 / x)


def quotient(x):
    return jnp.sum(x[0] / (x - 1.0))


def root(x):
    return jnp.sum(jax.lax.rsqrt(x))


GUARDS = [
    (log_of, f32(1.0, 2.0), lambda x: 1 / (x - 1.0), [False, True]),
    (reciprocal, f32(0.0, 2.0), lambda x: -3.0 / x**2, [False, True]),
    (root, f32(4.0, 0.0), lambda x: -0.5 * x**-1.5, [True, False]),
]


@pytest.mark.parametrize(("function", "x", "slopes", "fine"), GUARDS)
def test_a_guard_is_right_with_a_number_in_it(function, x, slopes, fine):
    report = sg.find_nonfinite(function)(x)
    assert "with your number for value" in report.hint
    new, _ = remedy(report)
    scope = {"jax": jax, "jnp": jnp, "x": x, "value": 7.0}
    assert jnp.where(jnp.array(fine), 0.0, eval(new, scope))[~np.array(fine)] == 7.0
    guarded = lambda x: jnp.sum(eval(new, scope | {"x": x}))
    expected = np.where(fine, slopes(np.where(fine, x, 3.0)), 0.0)
    np.testing.assert_allclose(jax.grad(guarded)(x), expected, rtol=1e-6)
    assert sg.find_nonfinite(guarded)(x) is None
