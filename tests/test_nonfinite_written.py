"""A remedy is written only where its text means what was tried out.

Each program hides something nonfinite. Where the report says what to write, that text
in the place of the other leaves what was healthy as it is, and mends the rest; where
the condition could be another value there, only what to mask is told.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_printed import mended, remedy
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X = f32(0, 2, 9)
CAUSAL = jnp.tril(jnp.ones((3, 3), bool)).at[1].set(False)


class Holder:
    mask = None


def an_item_is_set_again(x):
    d = {"m": x > 5}
    y = jnp.sqrt(x)
    d["m"] = x > 0
    return jnp.sum(jnp.where(d["m"], y, 0.0))


def an_item_is_set_later(x):
    d = {}
    y = jnp.sqrt(x)
    d["m"] = x > 0
    return jnp.sum(jnp.where(d["m"], y, 0.0))


def an_entry_of_a_list(x):
    m = [x > 5]
    y = jnp.sqrt(x)
    m[0] = x > 0
    return jnp.sum(jnp.where(m[0], y, 0.0))


def a_dict_is_updated(x):
    d = {"m": x > 5}
    y = jnp.sqrt(x)
    d.update(m=x > 0)
    return jnp.sum(jnp.where(d["m"], y, 0.0))


def an_attribute_is_set_again(x):
    holder = Holder()
    holder.mask = x > 5
    y = jnp.sqrt(x)
    holder.mask = x > 0
    return jnp.sum(jnp.where(holder.mask, y, 0.0))


def by_a_helper(x):
    holder = Holder()

    def look(x):
        holder.mask = x > 0

    holder.mask = x > 5
    y = jnp.sqrt(x)
    look(x)
    return jnp.sum(jnp.where(holder.mask, y, 0.0))


def nonlocal_by_a_helper(x):
    m = x > 5

    def look():
        nonlocal m
        m = x > 0

    y = jnp.sqrt(x)
    look()
    return jnp.sum(jnp.where(m, y, 0.0))


def a_condition_that_is_used_up(x):
    each = iter([x > 5, x > 0])
    next(each)
    return jnp.sum(jnp.where(next(each), jnp.sqrt(x), 0.0))


def a_call_in_between(x):
    seen = {"m": x > 5}

    def positive(seen):
        seen["m"] = x > 0

    y = jnp.sqrt(x)
    positive(seen)
    return jnp.sum(jnp.where(seen["m"], y, 0.0))


def a_parameter_of_a_lambda(x):
    m = x > 0
    return jnp.sum(jnp.where(m, jax.vmap(lambda x: jnp.sqrt(x))(x), 0.0))


def a_variable_of_a_comprehension(x):
    return jnp.sum(
        jnp.where(x > 0, sum([x * 2 for x in (1.0, 2.0)]) * jnp.sqrt(x), 0.0)
    )


def a_walrus(x):
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x) * (x := x + 1), 0.0))


NOT_WRITTEN = [
    an_item_is_set_again,
    an_item_is_set_later,
    an_entry_of_a_list,
    a_dict_is_updated,
    an_attribute_is_set_again,
    by_a_helper,
    nonlocal_by_a_helper,
    a_condition_that_is_used_up,
    a_call_in_between,
    a_parameter_of_a_lambda,
    a_variable_of_a_comprehension,
    a_walrus,
]


@pytest.mark.parametrize("function", NOT_WRITTEN, ids=lambda f: f.__name__)
def test_what_to_mask_is_told_where_its_text_would_be_another(function):
    assert not np.isfinite(jax.grad(function)(X)).all()
    report = sg.find_nonfinite(function)(X)
    assert remedy(report) is None
    assert "before it is used, too" in report.hint


def an_item(x):
    d = {"m": x > 0}
    y = jnp.sqrt(x)
    return jnp.sum(jnp.where(d["m"], y, 0.0))


def an_attribute(x):
    holder = Holder()
    holder.mask = x > 0
    y = jnp.sqrt(x)
    return jnp.sum(jnp.where(holder.mask, y, 0.0))


def a_pure_condition(x):
    y = jnp.sqrt(x)
    return jnp.sum(jnp.where(jnp.logical_not(x <= 0.0), y, 0.0))


def an_item_twice(x):
    d = {"x": x}
    return jnp.sum(jnp.where(d["x"] > 0, jnp.sqrt(d["x"]) * d["x"], 0.0))


def a_helper_that_is_called_twice(x):
    def ratio(x, m):
        y = 1.0 / x
        return jnp.where(m, y, 0.0)

    return ratio(x, x > 0).sum() + ratio(x - 2.0, x > 2).sum()


def a_jitted_helper_that_is_called_twice(x):
    @jax.jit
    def root(x):
        y = jnp.sqrt(x)
        return jnp.where(x > 0, y, 0.0)

    return root(x).sum() + root(x * 0.5).sum()


WRITTEN = [
    an_item,
    an_attribute,
    a_pure_condition,
    an_item_twice,
    a_helper_that_is_called_twice,
    a_jitted_helper_that_is_called_twice,
]


def healthy(function, x):
    """Derivatives by differences in float64, from the side where all is defined."""
    with jax.enable_x64(True):
        x = np.asarray(x, np.float64)
        found = []
        for k, h in enumerate(np.eye(3) * 1e-6):
            if x[k] > 2 or k == 1:
                one = function(jnp.asarray(x + h)) - function(jnp.asarray(x - h))
                found.append(float(one) / 2e-6)
        return found


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_what_is_written_mends_it(function):
    x = f32(0, 3, 9)
    report = sg.find_nonfinite(function)(x)
    edited = mended(function, report)
    assert edited is not None, str(report)
    np.testing.assert_allclose(edited(x), function(x), rtol=1e-6)
    grads = jax.grad(edited)(x)
    assert grads[0] == 0
    np.testing.assert_allclose(grads[1:], healthy(function, x), rtol=1e-4)


def the_other_call_reads_it(x):
    def ratio(x, m):
        y = 1.0 / x
        return jnp.where(m, y, 0.0), y.sum()

    a, _ = ratio(x, x > 0)
    _, s = ratio(x + 1.0, x > 100)
    return a.sum() + s


def the_other_call_takes_a_maximum(s):
    def masked(s, m):
        return jnp.where(m, s, -jnp.inf)

    a = jax.nn.softmax(masked(s, CAUSAL), -1)
    z = masked(s, CAUSAL & False).max(-1)
    return jnp.sum(a * s) + jnp.sum(jnp.where(jnp.isinf(z), 1.0, z))


@pytest.mark.parametrize(
    ("function", "x"),
    [(the_other_call_reads_it, X), (the_other_call_takes_a_maximum, jnp.ones((3, 3)))],
)
def test_no_edit_that_harms_another_call(function, x):
    assert remedy(sg.find_nonfinite(function)(x)) is None


def each_layer(x):
    def attend(q):
        s = jnp.where(CAUSAL, q, -jnp.inf)
        return jax.nn.softmax(s, -1)

    return jnp.sum(attend(attend(x) * x) * x)


def full_like_of_lax(x):
    s = jnp.where(CAUSAL, x, lax.full_like(x, -jnp.inf))
    return jnp.sum(jax.nn.softmax(s, -1) * x)


@pytest.mark.parametrize("function", [each_layer, full_like_of_lax])
def test_a_large_number_for_each_call(function):
    x = jnp.arange(9.0).reshape(3, 3) / 9
    edited = mended(function, sg.find_nonfinite(function)(x))
    # A row that is masked as a whole counts all alike, as the report says.
    rows = jnp.where(CAUSAL, x, -1e30)
    plain = jax.nn.softmax(rows, -1)
    if function is each_layer:
        plain = jax.nn.softmax(jnp.where(CAUSAL, plain * x, -1e30), -1)
    np.testing.assert_allclose(edited(x), jnp.sum(plain * x), rtol=1e-5)
    assert np.isfinite(jax.grad(edited)(x)).all()


def of_a_complex_number(x):
    z = x[:2] + 1j * x[2:]
    return jnp.sum(jnp.log(z).real)


def test_complex_numbers_are_kept_from_zero_alone():
    x = f32(-1, 0, 1, 0)
    report = sg.find_nonfinite(of_a_complex_number)(x)
    assert "jnp.where(z != 0, jnp.log(jnp.where(z != 0, z, 1.0)), value)" in (
        report.hint
    )


def test_a_quotient_that_leaves_the_range_has_no_divisor_of_zero():
    report = sg.find_nonfinite(lambda a, b: jnp.sum(a / b))(f32(1, 1e30), f32(1, 1e-30))
    assert report.hint == "the result leaves the range of float32"


def test_a_complex_number_by_zero():
    report = sg.find_nonfinite(lambda z: 1.0 / z)(jnp.complex64(0))
    assert report.hint.startswith("a number divided by zero is nan")  # so JAX has it


def by_a_norm(a):
    return jnp.sum(a * 2.0) / jnp.linalg.norm(a)


def by_a_norm_of_a_name(a):
    size = jnp.sqrt(jnp.sum(a * a))
    return jnp.sum(a / size)


def by_a_deviation(a):
    return jnp.sum(((a - a.mean()) / a.std()) ** 2)


def with_a_norm_beside(a):
    size = jnp.linalg.norm(a)
    return jnp.sum(jnp.log(a)) + size


def with_another_logarithm(a):
    total = jnp.sum(jnp.log(a))
    return total + jnp.sum(jnp.log(2.0 * a))


def by_a_sum(a):
    return jnp.sum(a * 2.0) / jnp.sum(a * a)


def by_an_entry(a):
    return jnp.sum((a + 1.0) / a)


@pytest.mark.parametrize(
    ("function", "does"),
    [
        (by_a_norm, False),
        (by_a_norm_of_a_name, False),
        (by_a_deviation, False),
        (with_a_norm_beside, False),
        (with_another_logarithm, False),
        (by_a_sum, True),
        (by_an_entry, True),
    ],
)
def test_a_guard_keeps_the_gradient_finite_too_or_is_not_written(function, does):
    """A norm at zero has no slope, whatever divides by it or is beside it."""
    x = f32(0, 0)
    report = sg.find_nonfinite(function)(x)
    assert "divided by zero" in report.hint or "logarithm of zero" in report.hint
    assert (remedy(report) is not None) == does
    if does:
        edited = mended_with(function, report, 7.0)
        assert np.isfinite(edited(x))
        assert np.isfinite(jax.grad(edited)(x)).all()


def mended_with(function, report, value):
    """The remedy asks for a number of the user's own."""
    edited = mended(function, report)
    edited.__globals__["value"] = value
    return edited
