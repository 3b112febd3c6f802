"""`sample.reinmax_given` against the authors' package, for the samples that it drew."""

import numpy as np
import pytest
import torch
from peers.torch.sides import cotangent, ours
from reinmax import reinmax

import stopgrad_jax as sg

RNG = np.random.default_rng(2)
LOGITS = {
    "normal": RNG.normal(size=(64, 5)) * 2,
    "equal": np.zeros((16, 7)),
    "large": RNG.normal(size=(64, 3)) * 60,
    "impossible": np.where(
        RNG.random((32, 6)) < 0.3, -np.inf, RNG.normal(size=(32, 6))
    ),
    "two": RNG.normal(size=(64, 2)),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("kind", LOGITS)
def test_reinmax(kind, temperature):
    logits = np.float32(LOGITS[kind])
    logits[:, 0] = np.where(np.isinf(logits).all(-1), 0, logits[:, 0])
    torch.manual_seed(0)
    leaf = torch.tensor(logits, requires_grad=True)
    sample, _ = reinmax(leaf, temperature)
    ct = cotangent(logits)
    sample.backward(torch.tensor(ct))

    drawn = sample.detach().numpy()
    mine = lambda x: sg.sample.reinmax_given(drawn, x, temperature)
    value, grad = ours(mine, logits, ct=ct)
    np.testing.assert_array_equal(value, drawn)
    # Theirs subtracts the mean of a row, which is 0 but for rounding.
    np.testing.assert_allclose(grad, leaf.grad.numpy(), 1e-5, 2e-6)
