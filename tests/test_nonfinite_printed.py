"""A printed edit mends the sample, and changes no other; or none is printed."""

import jax
import jax.numpy as jnp
import nonfinite_printed as cases
import numpy as np
import pytest
from as_printed import mended, remedy
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.nonfinite as _words

pytestmark = pytest.mark.usefixtures("usual_settings")
NAME = lambda f: getattr(f, "__name__", None)
ZERO, OTHER = cases.ZERO, cases.OTHER


def both(function, *args):
    return jax.value_and_grad(function)(*args)


def holds(function, failing, other):
    """The law: what is printed, in its place, mends the one and keeps the other."""
    edited = mended(function, sg.find_nonfinite(function)(*failing))
    if edited is None:
        return False
    edited.__globals__["value"] = 7.0
    assert all(map(np.all, map(np.isfinite, both(edited, *failing))))
    for a, b in zip(both(edited, *other), both(function, *other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    return True


@pytest.mark.parametrize("function", cases.FOREIGN, ids=NAME)
def test_what_is_not_the_array_is_not_masked(function):
    assert np.isnan(jax.grad(function)(ZERO)).any()
    report = sg.find_nonfinite(function)(ZERO)
    assert remedy(report) is None
    assert "Mask" not in report.hint


@pytest.mark.parametrize("function", [*cases.SECOND_NAME, cases.of_a_list], ids=NAME)
def test_an_array_with_a_second_name(function):
    assert not np.isfinite(jax.grad(function)(ZERO)).all()
    holds(function, [ZERO], [OTHER])


@pytest.mark.parametrize("function", cases.MENDED, ids=NAME)
def test_what_is_the_array_is_masked(function):
    assert np.isnan(jax.grad(function)(ZERO)).any()
    assert holds(function, [ZERO], [OTHER])


@pytest.mark.parametrize("function", cases.EFFECTS, ids=NAME)
def test_what_has_an_effect_is_written_once(function):
    x = f32(0.0, 0.0)
    assert not np.isfinite(function(x))
    printed = holds(function, [x], [OTHER])
    assert printed == (function is not cases.by_a_divisor_that_is_popped)


def of_a_plain_operand(x):
    return jnp.sum(jnp.log(x - 1.0))


def test_a_plain_operand_needs_no_name():
    report = sg.find_nonfinite(of_a_plain_operand)(f32(1.0, 2.0))
    assert ":=" not in report.hint
    assert holds(of_a_plain_operand, [f32(1.0, 2.0)], [f32(3.0, 2.0)])


@pytest.mark.parametrize("function", cases.SECOND_READER, ids=NAME)
def test_another_reader_is_not_changed(function):
    assert np.isnan(jax.grad(function)(ZERO)).any()
    holds(function, [ZERO], [OTHER])
    holds(function, [ZERO], [-OTHER])


@pytest.mark.parametrize(("function", "x"), cases.MIXED, ids=NAME)
def test_other_entries_that_read_it_are_not_changed(function, x):
    assert np.isnan(jax.grad(function)(x)).any()
    holds(function, [x], [f32(-0.5, 2.0)])
    holds(function, [x], [f32(3.0, -4.0)])


@pytest.mark.parametrize("function", cases.BRANCHES, ids=NAME)
def test_a_branch_that_was_not_taken_reads_it(function):
    report = sg.find_nonfinite(function)(ZERO)
    edited = mended(function, report)
    if edited is not None:
        other = [f(OTHER, train=False) for f in (edited, function)]
        np.testing.assert_allclose(*other)


@pytest.mark.parametrize("function", cases.LOOKED_FOR, ids=NAME)
def test_an_infinity_that_is_looked_for_stays(function):
    x = jnp.arange(6.0).reshape(2, 3)
    assert np.isnan(function(x, cases.ROWS))
    holds(function, [x, cases.ROWS], [x, cases.SOME])


@pytest.mark.parametrize("function", cases.NOT_LOOKED_FOR, ids=NAME)
def test_a_large_number_where_it_is_not(function):
    x = jnp.arange(6.0).reshape(2, 3)
    assert holds(function, [x, cases.ROWS], [x, cases.SOME])
    hint = sg.find_nonfinite(function)(x, cases.ROWS).hint
    assert "counts all its entries alike" in hint


def test_a_row_of_many_does_not_count_its_entries():
    x, m = jnp.arange(6.0).reshape(2, 3), cases.ROWS[::-1]
    report = sg.find_nonfinite(cases.online_softmax)(x, m)
    assert "no largest number to subtract" in report.hint
    assert "alike" not in report.hint
    edited = mended(cases.online_softmax, report)
    np.testing.assert_allclose(edited(x, m), jax.nn.logsumexp(x[1]), rtol=1e-6)


# Smaller ------------------------------------------------------------------------------


def cross_entropy(logits):
    log = jnp.log(jax.nn.softmax(logits))
    return -jnp.mean(jnp.sum(jax.nn.one_hot(jnp.array([0]), 3) * log, -1))


def entropy(x):
    p = jax.nn.sigmoid(x)
    return -jnp.sum(p * jnp.log(p))


@pytest.mark.parametrize(
    ("function", "x"),
    [(cross_entropy, f32(200.0, 0.0, 1.0)[None]), (entropy, f32(-200.0, 1.0))],
)
def test_a_loss_that_is_nan_without_jit_is_born_forward(function, x):
    assert np.isnan(function(x))
    report = sg.find_nonfinite(function)(x)
    assert (report.direction, report.primitive) == ("forward", "log")
    assert report.reaches == ("return",)


def test_an_infinite_gradient_is_not_called_nan():
    function = lambda x: jnp.sum(jax.scipy.special.entr(x))
    x = f32(0.0, 0.5)
    assert np.isposinf(jax.grad(function)(x)[0])  # - log x - 1
    report = sg.find_nonfinite(function)(x)
    assert report.hint == (
        "the gradient multiplies by it and is infinite: it has to be finite before it "
        "is used, not only after"
    )
    twice = lambda x: jnp.sum(jax.scipy.special.xlogy(x, x))
    assert np.isnan(jax.grad(twice)(x)[0])
    report = sg.find_nonfinite(twice)(x)
    assert report.hint == (
        "the gradient multiplies by it, and zero times an infinity is nan: it has to "
        "be finite before it is used, not only after"
    )


def root(x):
    return jnp.sum(jnp.sqrt(x))


def test_the_root_of_zero_is_healthy():
    assert holds(root, [f32(-1.0, 4.0)], [f32(0.0, 4.0)])
    report = sg.find_nonfinite(root)(f32(-1.0, 0.0))
    assert report.hint == _words.ROOT_OF_NEGATIVE
