"""`quantize` and `surrogate.sign` against brevitas."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp
from brevitas.core.quant import IntQuant
from brevitas.function import ops_ste
from peers.torch.sides import DTYPES, assert_alike, both, cotangent, points

import stopgrad_jax as sg

ROUNDINGS = {
    "round": (sg.quantize.round, ops_ste.round_ste),
    "floor": (sg.quantize.floor, ops_ste.floor_ste),
    "ceil": (sg.quantize.ceil, ops_ste.ceil_ste),
    "trunc": (sg.quantize.trunc, ops_ste.round_to_zero_ste),
    "clip": (
        lambda x: sg.quantize.clip(x, -0.5, 2.0),
        lambda x: ops_ste.scalar_clamp_ste(x, -0.5, 2.0),
    ),
    "sign": (
        lambda x: sg.surrogate.sign(x, sg.surrogate.identity()),
        ops_ste.binary_sign_ste,
    ),
    "three signs": (
        lambda x: sg.surrogate.sign(x, sg.surrogate.identity(), at_zero=0.0),
        ops_ste.ternary_sign_ste,
    ),
}
HALVES = np.arange(-4, 4.5, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUNDINGS)
def test_straight_through(kind, dtype):
    x = np.concatenate([points(dtype), HALVES.astype(dtype)])
    assert_alike(*ROUNDINGS[kind], x, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["round", "floor", "ceil", "clip"])
def test_at_infinity_and_nan(kind):
    x = np.float32([np.inf, -np.inf, np.nan])
    assert_alike(*ROUNDINGS[kind], x, rtol=0, atol=0)


def test_clip_of_arrays():
    x = points().reshape(-1, 1)
    low, high = np.float32([-1.0, -0.1, 0.0]), np.float32([1.0, 0.3, 4.0])
    x = np.broadcast_to(x, (x.size, 3))
    mine = lambda x: sg.quantize.clip(x, low, high)
    bounds = [torch.tensor(b).expand(x.shape) for b in (low, high)]
    assert_alike(mine, lambda x: ops_ste.tensor_clamp_ste(x, *bounds), x, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 0.125])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers(bits, signed, scale):
    """The mask is on the rounded code; a power of two divides without error."""
    quant = IntQuant(
        narrow_range=False,
        signed=signed,
        input_view_impl=Identity(),
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
    )
    fixed = [torch.tensor(float(v)) for v in (scale, 0.0, bits)]
    qmin, qmax = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    mine = lambda x: sg.quantize.fake_quant_affine(x, scale, 0, qmin, qmax)
    x = np.concatenate([points(), np.float32(HALVES * scale)])
    assert_alike(mine, lambda x: quant(*fixed, x), x, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_a_scale_that_learns(scale):
    """The gradient of lsq is theirs over sqrt(num_elements * qmax)."""
    quant = IntQuant(narrow_range=False, signed=True, input_view_impl=Identity())
    zero, bits = torch.tensor(0.0), torch.tensor(4.0)
    x = np.float32(np.random.default_rng(0).normal(size=500) * 2)
    v = x / np.float32(scale)  # theirs passes half a step more
    x = x[(abs(v) < 6.9) | (abs(v) > 8.6)]
    mine = functools.partial(sg.quantize.lsq, qmin=-8, qmax=7, num_elements=x.size)
    other = lambda x, scale: quant(scale, zero, bits, x)
    scale = np.float32(scale)
    (value, dx, ds), theirs = both(mine, other, x, scale, ct=cotangent(x))
    np.testing.assert_allclose(value, theirs[0], 1e-6)
    np.testing.assert_allclose(dx, theirs[1], 1e-6)
    np.testing.assert_allclose(ds * (7 * x.size) ** 0.5, theirs[2], 1e-4)


def test_the_gradient_of_abs_is_no_sign():
    """A number that ours has no name for, from the parts that it has."""
    mine = lambda x: sg.replace_value(
        sg.scale_gradient(x, sg.surrogate.sign(x, jnp.zeros_like)), jnp.abs(x)
    )
    assert_alike(mine, ops_ste.abs_binary_sign_grad, points(), rtol=0, atol=0)
