"""`surrogate.spike` against spikingjelly, which fires at 0."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from peers.torch.sides import DTYPES, assert_alike, both, points
from spikingjelly.activation_based import surrogate as jelly

import stopgrad_jax as sg


def scaled(factor, derivative):
    return lambda x: factor * derivative(x)


PRESETS = {
    "PiecewiseQuadratic": (
        jelly.PiecewiseQuadratic(2.0),
        sg.surrogate.triangle(width=0.5, peak=2.0),
    ),
    "PiecewiseExp": (jelly.PiecewiseExp(), sg.surrogate.exponential()),
    "PiecewiseExp, 3": (jelly.PiecewiseExp(3.0), sg.surrogate.exponential(1 / 3)),
    "Sigmoid": (jelly.Sigmoid(), sg.surrogate.sigmoid(4.0)),
    "SoftSign": (jelly.SoftSign(2.0), sg.surrogate.fast_sigmoid(2.0)),
    "SuperSpike": (jelly.SuperSpike(), sg.surrogate.fast_sigmoid(1.0)),
    "SuperSpike, 3": (
        jelly.SuperSpike(3.0),
        scaled(3.0, sg.surrogate.fast_sigmoid(1.0)),
    ),
    "ATan": (jelly.ATan(), sg.surrogate.atan()),
    "Erf": (jelly.Erf(2.0), sg.surrogate.gaussian(std=1 / (2 * math.sqrt(2)))),
    "LeakyKReLU": (jelly.LeakyKReLU(), sg.surrogate.leaky(slope=0.0)),
    "LeakyKReLU, 0.2": (jelly.LeakyKReLU(0.2, 3.0), sg.surrogate.leaky(0.2, peak=3.0)),
    "Rect": (jelly.Rect(2.0), sg.surrogate.boxcar(width=0.5, height=2.0)),
    "PiecewiseLeakyReLU": (
        jelly.PiecewiseLeakyReLU(w=0.5, c=0.01),
        lambda x: jnp.where(abs(x) < 0.5, 1.0, 0.01),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset(preset, dtype):
    other, derivative = PRESETS[preset]
    x = points(dtype)
    mine = lambda x: sg.surrogate.spike(x, derivative)
    rtol, atol = (2e-5, 1e-37) if dtype == "float32" else (1e-12, 1e-300)
    if preset == "Sigmoid":  # there 1 - s, which loses what is small
        atol = 2e-6 if dtype == "float32" else 1e-14
    assert_alike(mine, other, x, rtol=rtol, atol=atol)


@pytest.mark.parametrize("preset", PRESETS)
def test_at_infinity_and_nan(preset):
    """nan is silence there, and here it is nan."""
    other, derivative = PRESETS[preset]
    x = np.float32([np.inf, -np.inf, np.nan])
    mine = lambda x: sg.surrogate.spike(x, derivative)
    (value, grad), (their_value, their_grad) = both(mine, other, x)
    np.testing.assert_array_equal(value, [1, 0, np.nan])
    np.testing.assert_array_equal(their_value, [1, 0, 0])
    assert np.isfinite(grad[:2]).all()
    known = ~np.isnan(their_grad[:2])
    np.testing.assert_allclose(grad[:2][known], their_grad[:2][known])
