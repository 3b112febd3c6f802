"""`fake_quant_affine` and `lsq` against torch's fake quantization: equal to the bit."""

import functools

import numpy as np
import pytest
import torch
from peers.torch.sides import both, cotangent, points

import stopgrad_jax as sg

RANGES = [(-128, 127), (0, 255), (-8, 7), (0, 1)]
LEARNABLE = torch._fake_quantize_learnable_per_tensor_affine


def inputs(scale, zero_point, qmin, qmax):
    """Return numbers and, of each code around the range, the code and what rounds."""
    codes = np.arange(qmin - 3, qmax + 4)
    halves = np.concatenate([codes, codes + 0.5, codes - 0.5, codes + 0.49])
    x = np.concatenate([points(), np.float32((halves - zero_point) * scale)])
    return x[abs(x) < 1e9]  # theirs casts to a 64-bit int


@pytest.mark.parametrize("zero_point", ["low", "middle", "high"])
@pytest.mark.parametrize("scale", [0.5, 0.1, 0.0371, 3.0])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_per_tensor(scale, zero_point, qmin, qmax):
    zero = {"low": qmin, "middle": (qmin + qmax) // 2, "high": qmax}[zero_point]
    args = (np.float32(scale).item(), zero, qmin, qmax)
    mine = lambda x: sg.quantize.fake_quant_affine(x, *args)
    other = lambda x: torch.fake_quantize_per_tensor_affine(x, *args)
    x = inputs(*args)
    (value, grad), (their_value, their_grad) = both(mine, other, x)
    np.testing.assert_array_equal(value, their_value)
    np.testing.assert_array_equal(grad, their_grad)
    assert (grad == 0).any()
    assert (grad != 0).any()


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_per_channel(qmin, qmax):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(200, 5)) * 4)
    scale = np.float32(rng.uniform(0.01, 1.0, 5))
    zero = np.int32(rng.integers(qmin, qmax + 1, 5))
    mine = lambda x: sg.quantize.fake_quant_affine(x, scale, zero, qmin, qmax)
    fake = torch.fake_quantize_per_channel_affine
    other = lambda x: fake(x, torch.tensor(scale), torch.tensor(zero), 1, qmin, qmax)
    for a, b in zip(*both(mine, other, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_beyond_numbers():
    """Theirs makes some code of nan; ours is nan, and passes nothing."""
    x = np.float32([np.inf, -np.inf, np.nan, 1e30])
    mine = lambda x: sg.quantize.fake_quant_affine(x, 0.5, 0, -8, 7)
    other = lambda x: torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7)
    (value, grad), (their_value, _) = both(mine, other, x)
    np.testing.assert_array_equal(value, [3.5, -4, np.nan, 3.5])
    np.testing.assert_array_equal(grad, np.zeros(4))
    assert np.isfinite(their_value).all()


@pytest.mark.parametrize("step", [0.5, 0.1, 0.37])
@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (-8, 7), (0, 15)])
def test_lsq(step, qmin, qmax):
    """Theirs rounds before it compares with the range: half a step is treated apart."""
    x = inputs(step, 0, qmin, qmax)
    v = x / np.float32(step)
    middle, half = (qmin + qmax) / 2, (qmax - qmin) / 2
    at_edge = (abs(v - middle) > half - 1e-3) & (abs(v - middle) < half + 0.501)
    halfway = abs(v - np.floor(v) - 0.5) < 1e-3  # rounding of v decides
    x = x[~at_edge & ~halfway]
    count = x.size
    factor = 1 / (count * qmax) ** 0.5
    mine = functools.partial(sg.quantize.lsq, qmin=qmin, qmax=qmax, num_elements=count)
    zero = torch.zeros(1)
    other = lambda x, s: LEARNABLE(x, s, zero, qmin, qmax, factor)
    step = np.float32([step])
    (value, dx, ds), theirs = both(mine, other, x, step, ct=cotangent(x))
    np.testing.assert_allclose(value, theirs[0], 1e-6)
    np.testing.assert_array_equal(dx, theirs[1])
    np.testing.assert_allclose(ds, theirs[2], 1e-4)
