"""What comes back at and beyond the ends of a quantizer's range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import assert_same_bits, every_value, f32, instructions

import stopgrad_jax as sg

q = sg.quantize


def slopes(f, x):
    """Return the cotangent of each entry, for 1 at each."""
    value, pull = jax.vjp(f, x)
    return pull(jnp.ones_like(value))[0]


def affine(x, scale, gradient, qmin=-128, qmax=127):
    return q.fake_quant_affine(x, scale, 0, qmin, qmax, gradient=gradient)


# The scale of x itself ----------------------------------------------------------------

# Of largest entries that 127.5 divides: rounding errors decide for others.
ROWS = f32([1.0, -0.2, 0.5], [-3.0, 3.0, 0.1], [0.0, -8.0, 2.0], [0.7, 1e-3, 5.0])
ROWS = (
    ROWS
    / jnp.abs(ROWS).max(-1, keepdims=True)
    * f32(127.5, 255.0, 510.0, 1020)[:, None]
)


def dynamic(x, divisor, gradient):
    return affine(x, jnp.abs(x).max(-1, keepdims=True) / divisor, gradient)


@pytest.mark.parametrize("divisor", [127.5, 127.0])
def test_dynamic_scale(divisor, run):
    """127.5 is rounded to 128, and clipped; -127.5 to -128, which is a code."""
    clipped, through = (
        slopes(run(lambda x, g=g: dynamic(x, divisor, g)), ROWS)
        for g in ("clipped", "straight_through")
    )
    np.testing.assert_array_equal(through, 1)
    largest = np.asarray(ROWS) == np.abs(ROWS).max(-1, keepdims=True)
    assert largest.sum() == 3  # the third row's is negative
    np.testing.assert_array_equal(clipped, ~largest if divisor == 127.5 else 1)
    values = (dynamic(ROWS, divisor, g) for g in ("clipped", "straight_through"))
    assert_same_bits(*values)


def test_dynamic_scale_of_any_rows():
    """Of 500 rows, many lose their largest; never any other, nor straight through."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (500, 8), jnp.float32))
    lost = slopes(lambda x: dynamic(x, 127.5, "clipped"), x) == 0
    assert 100 < lost.sum()
    assert np.all(np.asarray(x)[lost] == x.max(-1)[lost.any(-1)])
    through = slopes(lambda x: dynamic(x, 127.5, "straight_through"), x)
    np.testing.assert_array_equal(through, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_straight_through_is_the_same_value_and_passes_everything(dtype, run):
    """At infinity and nan too, in both modes."""
    x = every_value(dtype)
    f = lambda gradient: run(lambda x: affine(x, 0.25, gradient, -8, 7))
    assert_same_bits(f("straight_through")(x), f("clipped")(x))
    ct = jnp.full_like(x, 3)
    np.testing.assert_array_equal(jax.vjp(f("straight_through"), x)[1](ct)[0], 3)
    np.testing.assert_array_equal(jax.jvp(f("straight_through"), (x,), (ct,))[1], 3)
    none = slopes(f("clipped"), jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], dtype))
    np.testing.assert_array_equal(none, 0)


def test_by_straight_through_any_quantizer_passes_everything():
    """The recipe: what is forward is stopped, the first argument is differentiated."""
    x = f32(-9.0, -6.0, 0.3, 6.0, 9.0)
    for forward in (
        lambda x: q.fake_quant(x, -6.0, 6.0),
        lambda x: q.fake_quant(x, *sg.stop_gradient((x.min(), x.max()))),
        lambda x: affine(x, jnp.abs(x).max() / 129, "clipped"),
        lambda x: q.lsq(x, 0.5, -8, 7, num_elements=5),
    ):
        f = sg.straight_through(forward)
        assert_same_bits(f(x), forward(x))
        np.testing.assert_array_equal(slopes(f, x), 1)
        assert not np.all(slopes(forward, x) == 1)


def test_a_scale_computed_from_x_is_not_differentiated():
    x = f32(-1.0, 0.3, 2.0)
    of_itself = lambda x: affine(x, jnp.abs(x).max() / 127, "straight_through")
    ct = f32(3.0, -1.0, 2.0)
    np.testing.assert_array_equal(jax.vjp(of_itself, x)[1](ct)[0], ct)


# The ends themselves ------------------------------------------------------------------


@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-8, 7, 0), (0, 15, 3), (0, 1, 1)])
def test_affine_at_each_end(qmin, qmax, zero):
    """A code that is rounded to the end is inside; half to even decides halves."""
    ends = np.array([qmin, qmax]) - zero
    nudges = np.array([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1])
    x = np.float32(0.25) * (ends[:, None] + nudges).ravel()
    f = lambda x: q.fake_quant_affine(x, 0.25, zero, qmin, qmax)
    code = np.round(x / 0.25) + zero
    inside = (code >= qmin) & (code <= qmax)
    np.testing.assert_array_equal(slopes(f, jnp.float32(x)), inside)
    clipped = np.clip(x, *(0.25 * ends))
    assert np.abs(f(jnp.float32(x)) - clipped).max() <= 0.125


@pytest.mark.parametrize(("low", "high"), [(-6.0, 6.0), (-1.3, 4.7), (2.0, 6.0)])
def test_fake_quant_at_each_end(low, high):
    """The ends of the nudged range are inside, their neighbors outside not."""
    f = lambda x: q.fake_quant(x, low, high)
    first, last = f(f32(-99.0, 99.0))
    x = f32(first, last, first - 1e-5, last + 1e-5)
    np.testing.assert_array_equal(slopes(f, x), [1, 1, 0, 0])
    many = jnp.linspace(-9, 9, 4001, dtype=jnp.float32)
    step = (high - low) / 255
    apart = np.abs(f(many) - np.clip(many, first, last))
    assert apart.max() < 0.501 * step


def test_fake_quant_of_its_own_range():
    """What lies beyond the nudged end comes back through max, if it is not stopped."""
    x = f32(-6.0, 0.5, 6.0)
    own = lambda x: q.fake_quant(x, x.min(), x.max())
    fixed = lambda x: q.fake_quant(x, *sg.stop_gradient((x.min(), x.max())))
    assert own(x)[2] < 6
    np.testing.assert_array_equal(slopes(own, x), [1, 1, 1])
    np.testing.assert_array_equal(slopes(fixed, x), [1, 1, 0])


def test_lsq_with_a_step_of_x_itself():
    """The largest lies at the end, which is outside; the step has its gradient."""
    x = f32(-0.3, 0.5, 1.75)
    f = lambda x: q.lsq(x, 0.25, -8, 7, num_elements=1)
    np.testing.assert_array_equal(slopes(f, x), [1, 1, 0])
    dstep = jax.grad(lambda s: q.lsq(x[2:], s, -8, 7, num_elements=1).sum())(0.25)
    np.testing.assert_allclose(dstep, 7 / np.sqrt(7), rtol=1e-6)


def test_an_unknown_gradient_is_refused():
    words = (
        r'gradient is "clipped" or "straight_through"\s+got: [\s\S]*write: gradient='
    )
    with pytest.raises(ValueError, match=words):
        affine(f32(1.0), 0.5, "everywhere")


@pytest.mark.usefixtures("usual_settings")
def test_straight_through_costs_what_its_value_costs():
    x, scale = f32(0.3, -5.0, 0.9), jnp.float32(0.25)
    ours = lambda x, s: affine(x, s, "straight_through", -8, 7)

    def by_hand(x, s):
        value = jnp.clip(jnp.round(x * (1 / s)), -8, 7) * s
        return x + jax.lax.stop_gradient(value - x)

    gradient = lambda f: jax.grad(lambda x, s: jnp.sum(f(x, s) ** 2))
    for wrap in (lambda f: f, gradient):
        assert instructions(wrap(ours), x, scale) <= instructions(
            wrap(by_hand), x, scale
        )
