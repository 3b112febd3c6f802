"""What an accelerator computes otherwise: sums in another order, no float64 units."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stopgrad_jax as sg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="no accelerator here"),
]


def _loss(params, x):
    hidden = jnp.tanh(x @ params["w"])
    hidden = sg.clip_gradient_norm(hidden, 0.1)
    return jnp.mean(sg.straight_through(jnp.round)(hidden * 4.0) ** 2)


def test_training_agrees_with_a_cpu():
    """To 1e-3: matrix products of an accelerator may round to tf32."""
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
            step = sg.train.make_step(_loss, optax.sgd(0.05))
            data = jnp.cos(jnp.arange(20 * 16 * 8.0)).reshape(20, 16, 8)
            same = {"steps": 20, "progress": False}
            state, history = sg.train.fit(step, step.init(params), data, **same)
            found.append((history["loss"], np.asarray(state.params["w"])))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bits_are_kept():
    x = jnp.asarray(np.random.RandomState(0).randn(10_000), jnp.float32)
    for gate in (sg.reverse_gradient, lambda x: sg.clip_gradient(x, -1.0, 1.0)):
        assert np.array_equal(jax.jit(gate)(x), x)
    for dtype in ("bfloat16", "float16"):
        y = (1000 * x).astype(dtype)
        exact = jax.jit(sg.straight_through(jnp.sign))(y)
        assert np.array_equal(exact, jnp.sign(y))
