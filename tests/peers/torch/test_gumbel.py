"""`sample` against `torch`'s own samplers, for the noise that they drew."""

import numpy as np
import pytest
import torch
from peers.torch.sides import cotangent, ours
from torch.distributions import OneHotCategoricalStraightThrough
from torch.nn.functional import gumbel_softmax

import stopgrad_jax as sg

RNG = np.random.default_rng(3)
LOGITS = {
    "normal": RNG.normal(size=(64, 5)) * 2,
    "equal": np.zeros((16, 7)),
    "large": RNG.normal(size=(64, 3)) * 60,
    "impossible": [[-np.inf, 0.0, 1.0], [0.0, -np.inf, -np.inf], [3.0, 2.0, -np.inf]],
    "one": RNG.normal(size=(4, 1)),
    "vector": RNG.normal(size=9),
}


def drawn(logits, temperature, hard):
    """Return what torch draws and its gradient; the noise, drawn again; a cotangent."""
    leaf, ct = torch.tensor(logits, requires_grad=True), cotangent(logits)
    torch.manual_seed(0)
    noise = -torch.empty_like(leaf).exponential_().log()
    torch.manual_seed(0)
    value = gumbel_softmax(leaf, temperature, hard)
    value.backward(torch.tensor(ct))
    return value.detach().numpy(), leaf.grad.numpy(), noise.detach().numpy(), ct


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("kind", LOGITS)
def test_gumbel_softmax(kind, temperature, hard):
    logits = np.float32(LOGITS[kind])
    their_value, their_grad, noise, ct = drawn(logits, temperature, hard)
    mine = lambda x: sg.sample.gumbel_softmax_given(noise, x, temperature, hard)
    value, grad = ours(mine, logits, ct=ct)
    np.testing.assert_allclose(value, their_value, 1e-5, 2e-7)
    np.testing.assert_allclose(grad, their_grad, 2e-5, 1e-6)
    if hard:
        assert set(np.unique(value)) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", ["normal", "equal", "large", "impossible"])
def test_straight_through_categorical(kind):
    logits = np.float32(LOGITS[kind])
    leaf, ct = torch.tensor(logits, requires_grad=True), cotangent(logits)
    torch.manual_seed(0)
    sample = OneHotCategoricalStraightThrough(logits=leaf).rsample()
    sample.backward(torch.tensor(ct))
    hot = np.round(sample.detach().numpy())
    mine = lambda x: sg.sample.categorical_given(hot, x)
    value, grad = ours(mine, logits, ct=ct)
    np.testing.assert_allclose(value, sample.detach().numpy(), 1e-6)
    np.testing.assert_allclose(grad, leaf.grad.numpy(), 1e-5, 1e-6)
