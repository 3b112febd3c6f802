"""`quantize.fake_quant` against TensorFlow's fake_quant_with_min_max_vars, live."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

import stopgrad_jax as sg

RANGES = {
    "a little more than needed": (-6.0, 6.0),
    "around 0": (-1.3, 2.1),
    "above 0": (2.0, 6.0),
    "below 0": (-6.0, -2.0),
    "from 0": (0.0, 6.0),
    "to 0": (-6.0, 0.0),
    "narrow": (-0.01, 0.013),
    "wide": (-1e3, 4e4),
    "thirds": (-0.1, 0.2),
}


def inputs(low, high):
    """Return numbers inside and outside, the ends and what is next to them."""
    low, high = np.float32(low), np.float32(high)
    rng = np.random.default_rng(0)
    ends = [np.nextafter(v, v + d) for v in (low, high) for d in (-1, 0, 1)]
    inside = rng.uniform(2 * low - high, 2 * high - low, 400)
    return np.float32([0, -0.0, *ends, *inside])


def both(x, low, high, ct, per_channel=False, **options):
    """Return the value and three gradients, ours and theirs."""
    args = tuple(np.float32(v) for v in (x, low, high))
    mine = functools.partial(sg.quantize.fake_quant, **options)
    value, pull = jax.vjp(mine, *args)
    name = "fake_quant_with_min_max_vars" + "_per_channel" * per_channel
    leaves = [tf.constant(a) for a in args]
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        their_value = getattr(tf.quantization, name)(*leaves, **options)
    theirs = tape.gradient(their_value, leaves, tf.constant(ct))
    return [value, *pull(jnp.asarray(ct))], [a.numpy() for a in (their_value, *theirs)]


def nudged(low, high, num_bits, narrow_range):
    """Return the ends of the nudged range and the step, in float64."""
    qmin, qmax = int(narrow_range), 2**num_bits - 1
    low, high = float(np.float32(low)), float(np.float32(high))
    step = (high - low) / (qmax - qmin)
    zero = np.clip(np.floor(qmin - low / step + 0.5), qmin, qmax)
    return (qmin - zero) * step, (qmax - zero) * step, step


@pytest.mark.parametrize("narrow_range", [False, True], ids=["full", "narrow"])
@pytest.mark.parametrize("num_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("span", RANGES)
def test_per_tensor(span, num_bits, narrow_range):
    low, high = RANGES[span]
    options = {"num_bits": num_bits, "narrow_range": narrow_range}
    x = inputs(low, high)
    ct = np.float32(np.random.default_rng(1).uniform(-2, 2, x.shape))
    ours, theirs = both(x, low, high, ct, **options)
    start, end, step = nudged(low, high, **options)
    # What rounding can move over a step's middle, or over an end.
    code = (np.clip(x, start, end) - start) / step
    close = abs(code - np.floor(code) - 0.5) < 1e-2
    size = max(abs(start), abs(end))
    np.testing.assert_allclose(
        ours[0][~close], theirs[0][~close], 1e-5, 2e-6 * size + 1e-3 * step
    )
    np.testing.assert_allclose(ours[0][close], theirs[0][close], 1e-5, 1.01 * step)
    at_end = np.minimum(abs(x - start), abs(x - end)) < 1e-6 * size
    np.testing.assert_array_equal(ours[1][~at_end], theirs[1][~at_end])
    loss = 2 * at_end.sum() + 1e-3
    np.testing.assert_allclose(ours[2], theirs[2], 1e-4, loss)
    np.testing.assert_allclose(ours[3], theirs[3], 1e-4, loss)
    assert ours[0][0] == 0


def test_per_channel():
    rng = np.random.default_rng(2)
    low, high = -rng.uniform(0.5, 3, 7), rng.uniform(0.5, 3, 7)
    x = rng.normal(size=(300, 7)) * 2
    ct = np.float32(rng.uniform(-2, 2, x.shape))
    ours, theirs = both(x, low, high, ct, per_channel=True)
    np.testing.assert_allclose(ours[0], theirs[0], 1e-5, 1e-5)
    np.testing.assert_array_equal(ours[1], theirs[1])
    for grad, their_grad in zip(ours[2:], theirs[2:], strict=True):
        np.testing.assert_allclose(grad, their_grad, 1e-5, 1e-4)


def test_a_range_not_yet_seen():
    x = np.float32([-2, 0, 3])
    ours, theirs = both(x, 0.0, 0.0, x)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_six_gives_the_range_that_is_documented():
    x = np.float32([-9, 9])
    ours, theirs = both(x, -6.0, 6.0, x)
    for value in (ours[0], theirs[0]):
        np.testing.assert_allclose(value, [-6.0235, 5.9765], 1e-5)
    np.testing.assert_array_equal(ours[2:], [-9, 9])
    np.testing.assert_array_equal(theirs[2:], [-9, 9])


def test_a_symmetric_range_lies_between_two_zero_points():
    """Rounding errors decide there: -6 to 6 goes down as here, -1 to 1 goes up."""
    x = np.float32([-9, 9])
    ours, theirs = both(x, -1.0, 1.0, x)
    np.testing.assert_allclose(ours[0], [-128 * 2 / 255, 127 * 2 / 255], 1e-6)
    np.testing.assert_allclose(theirs[0], [-127 * 2 / 255, 128 * 2 / 255], 1e-6)


def test_nan_and_infinity():
    x = np.float32([np.inf, -np.inf, np.nan])
    ours, theirs = both(x, -1.3, 2.1, np.ones_like(x))
    np.testing.assert_allclose(ours[0], theirs[0], 1e-6)
    assert np.isnan(ours[0][2])
    for grad, their_grad in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(grad, their_grad)
