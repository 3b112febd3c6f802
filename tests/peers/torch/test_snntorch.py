"""`surrogate.spike` against snntorch: its derivatives, and a network of 100 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snntorch
import torch
from peers.torch.sides import assert_alike, both, points, theirs
from snntorch import surrogate as snn

import stopgrad_jax as sg

# snntorch's factory, our derivative
PRESETS = {
    "straight through": (snn.straight_through_estimator(), sg.surrogate.identity()),
    "fast sigmoid, 25": (snn.fast_sigmoid(), sg.surrogate.fast_sigmoid()),
    "fast sigmoid, 3": (snn.fast_sigmoid(3), sg.surrogate.fast_sigmoid(3.0)),
    "atan, 2": (snn.atan(), sg.surrogate.atan()),
    "atan, 5": (snn.atan(5), sg.surrogate.atan(5.0)),
    "heaviside": (snn.heaviside(), lambda x: x > 0),
    "triangular": (snn.triangular(), lambda x: jnp.where(x >= 0, -1.0, 1.0)),
    "escape": (
        snn.spike_rate_escape(beta=2, slope=3),
        lambda x: sg.surrogate.exponential(0.5, 3.0)(x - 1),
    ),
}


def fire(derivative):
    return lambda x: sg.surrogate.spike(x, derivative, at_zero=0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset(preset):
    other, derivative = PRESETS[preset]
    assert_alike(fire(derivative), other, points(), rtol=1e-5)


@pytest.mark.parametrize("slope", [25.0, 2.0])
def test_the_sigmoid_where_it_is_a_number_there(slope):
    """Its quotient of exponentials overflows: 0 from -1.8 on, nan from -3.6 on."""
    x = points()
    mine, other = fire(sg.surrogate.sigmoid(slope)), snn.sigmoid(slope)
    (value, grad), (their_value, their_grad) = both(mine, other, x)
    np.testing.assert_array_equal(value, their_value)
    overflows = x < -44 / slope
    np.testing.assert_allclose(grad[~overflows], their_grad[~overflows], 2e-5, 1e-36)
    assert np.isfinite(grad).all()
    assert (their_grad[overflows] == 0).any()
    assert np.isnan(their_grad[x < -89 / slope]).all()
    # the closed form, which is even
    mirrored = theirs(other, -x[overflows], ct=np.ones_like(x[overflows]))[1]
    got = jax.vmap(jax.grad(mine))(x[overflows])
    np.testing.assert_allclose(got, mirrored, 2e-5, 1e-36)


def test_leaky_against_its_closed_form():
    """`LSO` calls another class there, and its own returns too few gradients."""
    x = points()
    with pytest.raises(TypeError, match="variance"):
        snn.LSO(0.1)(torch.tensor(x))
    leaf = torch.tensor(x, requires_grad=True)
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        snn.LeakySpikeOperator.apply(leaf, 0.1).sum().backward()
    grad = jax.vmap(jax.grad(fire(sg.surrogate.leaky(0.1))))(x)
    np.testing.assert_array_equal(grad, np.where(x >= 0, 1, np.float32(0.1)))


@pytest.mark.parametrize("preset", PRESETS)
def test_nan_is_silence_there_and_nan_here(preset):
    other, derivative = PRESETS[preset]
    x = np.float32([np.nan])
    (value, _), (their_value, _) = both(fire(derivative), other, x)
    assert np.isnan(value).all()
    assert (their_value == 0).all()


@pytest.mark.parametrize("preset", ["fast sigmoid, 3", "atan, 2"])
def test_a_network_of_leaky_neurons(preset):
    """A hundred steps, two layers, a reset by subtraction through which none flows."""
    other, derivative = PRESETS[preset]
    rng = np.random.default_rng(1)
    x = np.float32(rng.random((100, 3, 8)) < 0.3)
    w, v = (np.float32(rng.normal(size=s) * 0.4) for s in ((8, 16), (16, 4)))
    beta, threshold = 0.9, 1.0

    def ours(w, v):
        def neuron(potential, current):
            reset = potential > threshold
            potential = beta * potential + current - threshold * reset
            above = potential - threshold
            return potential, sg.surrogate.spike(above, derivative, at_zero=0.0)

        def step(carry, x):
            first, spikes = neuron(carry[0], x @ w)
            second, out = neuron(carry[1], spikes @ v)
            return (first, second), out

        start = jnp.zeros((3, 16)), jnp.zeros((3, 4))
        return jax.lax.scan(step, start, x)[1]

    def torch_network(w, v):
        first, second = (
            snntorch.Leaky(beta, threshold, spike_grad=other, init_hidden=False)
            for _ in range(2)
        )
        states, outs = [first.init_leaky(), second.init_leaky()], []
        for row in torch.tensor(x):
            spikes, states[0] = first(row @ w, states[0])
            out, states[1] = second(spikes @ v, states[1])
            outs.append(out)
        return torch.stack(outs)

    ct = np.float32(rng.normal(size=(100, 3, 4)))
    mine, others = both(ours, torch_network, w, v, ct=ct)
    np.testing.assert_array_equal(mine[0], others[0])
    assert 0.05 < mine[0].mean() < 0.95
    for grad, their_grad in zip(mine[1:], others[1:], strict=True):
        np.testing.assert_allclose(grad, their_grad, 1e-3, 1e-4 * abs(grad).max())
