"""`surrogate.sign` against larq's quantizers for binary networks, live."""

import jax
import jax.numpy as jnp
import larq
import numpy as np
import pytest
import tensorflow as tf

import stopgrad_jax as sg

CORNERS = np.float32([0, 0.25, 0.5, 1, 1.3, 2])
NEAR = [np.nextafter(CORNERS, np.float32(to)) for to in (-9, 9)]
ROWS = np.concatenate([CORNERS, *NEAR, np.float32([1e-30, 3, 10, 1e4, 1e30])])
NORMAL = np.float32(np.random.default_rng(0).normal(size=300))
X = np.concatenate([ROWS, -ROWS, NORMAL])
CT = np.float32(np.random.default_rng(1).uniform(-2, 2, X.shape))


def within(bound):
    return lambda x: abs(x) <= bound


def sign(derivative):
    return lambda x: sg.surrogate.sign(x, derivative)


def heaviside(derivative):
    return lambda x: sg.surrogate.spike(x, derivative, at_zero=0.0)


Q = larq.quantizers
PRESETS = {
    "ste_sign": (Q.SteSign(), sign(sg.surrogate.hard_tanh())),
    "ste_sign, no clip": (Q.SteSign(None), sign(sg.surrogate.identity())),
    "ste_sign, clip 1.3": (Q.SteSign(1.3), sign(within(np.float32(1.3)))),
    "approx_sign": (Q.ApproxSign(), sign(sg.surrogate.approx_sign())),
    "swish_sign": (Q.SwishSign(), sign(sg.surrogate.swish_sign())),
    "swish_sign, 2": (Q.SwishSign(2.0), sign(sg.surrogate.swish_sign(2.0))),
    "ste_heaviside": (Q.SteHeaviside(), heaviside(sg.surrogate.hard_tanh())),
    "ste_tern": (
        Q.SteTern(threshold_value=0.5),
        lambda x: sg.replace_value(
            sg.mask_gradient(x, abs(x) <= 1),
            jnp.where(abs(x) >= 0.5, jnp.sign(x), 0),
        ),
    ),
    "DoReFa": (
        Q.DoReFa(k_bit=3),
        lambda x: (
            sg.quantize.round(
                sg.replace_value(sg.mask_gradient(x, (x >= 0) & (x <= 1)), x.clip(0, 1))
                * 7
            )
            / 7
        ),
    ),
}


def both(mine, other, x, ct):
    """Return value and gradient, ours and theirs."""
    value, pull = jax.vjp(mine, x)
    leaf = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(leaf)
        their_value = other(leaf)
    their_grad = tape.gradient(their_value, leaf, tf.constant(ct))
    return (value, pull(ct)[0]), (their_value.numpy(), their_grad.numpy())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset(preset):
    other, mine = PRESETS[preset]
    (value, grad), (their_value, their_grad) = both(mine, other, X, CT)
    np.testing.assert_allclose(value, their_value, 1e-7)
    rtol, atol = (1e-5, 1e-6) if "swish" in preset else (5e-7, 0)
    np.testing.assert_allclose(grad, their_grad, rtol, atol)


def test_swish_where_its_quotient_overflows():
    x = np.float32([3e38, -3e38, np.inf, -np.inf])
    other, mine = PRESETS["swish_sign"]
    (value, grad), (their_value, their_grad) = both(mine, other, x, np.ones_like(x))
    np.testing.assert_array_equal(value, their_value)
    assert np.isnan(their_grad).all()
    np.testing.assert_array_equal(grad, 0)


def test_magnitude_aware_sign():
    """A scale per channel, held fixed."""
    x = np.float32(np.random.default_rng(2).normal(size=(40, 6)))

    def mine(x):
        scale = sg.stop_gradient(jnp.mean(abs(x), 0))
        return scale * sg.surrogate.sign(x, sg.surrogate.hard_tanh())

    ours, theirs = both(mine, Q.MagnitudeAwareSign(), x, CT[:240].reshape(x.shape))
    np.testing.assert_allclose(ours[0], theirs[0], 1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], 1e-5)
