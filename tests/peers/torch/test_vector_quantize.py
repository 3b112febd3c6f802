"""`quantize`'s codebooks against vector-quantize-pytorch."""

import jax
import numpy as np
import pytest
import torch
from peers.torch.sides import both, cotangent
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

import stopgrad_jax as sg

GRADIENTS = ["straight_through", "rotation"]


def normal(*shape):
    return np.float32(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.parametrize("symmetric", [False, True], ids=["shifted", "symmetric"])
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4, 7), (16,), (2, 2)], ids=str)
def test_fsq(levels, symmetric):
    """Theirs refuses 2 levels, shifted: all but 7 in 100,000 would be one code."""
    if 2 in levels and not symmetric:
        with pytest.raises(AssertionError, match="preserve_symmetry"):
            FSQ(levels)
        return
    x = normal(400, len(levels)) * 2
    x = np.concatenate([x, [[s] * len(levels) for s in (0.0, 1e-6, 30.0, -30.0)]])
    variant = "symmetric" if symmetric else "lucidrains"
    mine = lambda z: sg.quantize.fsq(z, levels, variant=variant)
    quantizer = FSQ(levels, preserve_symmetry=symmetric)
    (value, grad), theirs = both(mine, quantizer.quantize, np.float32(x))
    # A value within rounding of halfway may go to either side.
    same = np.isclose(value, theirs[0], atol=1e-6)
    assert same.mean() > 0.999
    np.testing.assert_allclose(grad, theirs[1], 1e-4, 1e-6)


@pytest.mark.parametrize("spherical", [False, True], ids=["lfq", "bsq"])
def test_signs(spherical):
    """At z = 0, which has no direction, ours passes and theirs multiplies by 1e12."""
    x = normal(100, 6)
    x[:20] = np.where(x[:20] < -0.3, 0.0, x[:20])
    x[20:30] *= 1e-3
    quantizer = LFQ(dim=6, spherical=spherical, entropy_loss_weight=0.0)
    mine = sg.quantize.bsq if spherical else sg.quantize.lfq
    other = lambda z: quantizer(z[None])[0][0]
    (value, grad), theirs = both(mine, other, x)
    np.testing.assert_allclose(value, theirs[0], 1e-6)
    np.testing.assert_allclose(grad, theirs[1], 2e-5, 1e-5)
    if spherical:
        origin = np.zeros((1, 6), np.float32)
        (_, grad), (_, their_grad) = both(mine, other, origin)
        np.testing.assert_array_equal(grad, cotangent(origin))
        assert abs(their_grad).max() > 1e9


def quantizer(codebook, gradient):
    made = VectorQuantize(
        dim=codebook.shape[1],
        codebook_size=len(codebook),
        rotation_trick=gradient == "rotation",
        learnable_codebook=True,
        ema_update=False,
    )
    made._codebook.embed.data = torch.tensor(codebook)[None]
    return made


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_codes_and_gradient_of_z(gradient):
    z = normal(300, 8)
    codebook = normal(32, 8)
    made = quantizer(codebook, gradient)
    mine = lambda z: sg.quantize.vector_quantize(z, codebook, gradient=gradient)[0]
    other = lambda z: made(z[None])[0][0]
    (value, grad), (their_value, their_grad) = both(mine, other, z)
    np.testing.assert_allclose(value, their_value, 1e-4, 1e-5)  # theirs is not exact
    np.testing.assert_allclose(grad, their_grad, 1e-4, 1e-5)
    indices = sg.quantize.vector_quantize(z, codebook).indices
    np.testing.assert_array_equal(indices, made(torch.tensor(z)[None])[1][0])
    np.testing.assert_array_equal(value, codebook[indices])


def test_losses():
    """Theirs is one number with the gradients of both of ours."""
    z = normal(300, 8)
    codebook = normal(32, 8)
    made = quantizer(codebook, "straight_through")
    leaf = torch.tensor(z, requires_grad=True)
    loss = made(leaf[None])[2]
    loss.sum().backward()

    def mine(z, codebook):
        out = sg.quantize.vector_quantize(z, codebook)
        return out.codebook_loss + out.commitment_loss

    value, (dz, dcodebook) = jax.value_and_grad(mine, (0, 1))(z, codebook)
    np.testing.assert_allclose(value / 2, loss.item(), 1e-5)
    np.testing.assert_allclose(dz, leaf.grad, 1e-4, 1e-7)
    their_codebook = made._codebook.embed.grad[0].numpy()
    np.testing.assert_allclose(dcodebook, their_codebook, 1e-4, 1e-7)


def rotated(z, code):
    """Return the gradients for one z and its code, ours and theirs."""
    z, code = (np.float32(a)[None] for a in (z, code))
    mine = lambda z: sg.quantize.vector_quantize(z, code, gradient="rotation")[0]
    other = lambda z: rotate_to(z, torch.tensor(code))
    (_, grad), (_, their_grad) = both(mine, other, z)
    return grad[0], their_grad[0], cotangent(z)[0]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("angle", [0.0, 1e-3, 1.0, 2.0, 3.0, 3.1])
def test_rotation_at_any_angle(angle, size):
    z, code = size * np.array([3.0, 4.0]), 5 * np.exp(1j * (np.angle(3 + 4j) + angle))
    grad, their_grad, _ = rotated(z, [code.real, code.imag])
    np.testing.assert_allclose(grad, their_grad, 1e-3, 1e-4 * abs(grad).max())


@pytest.mark.parametrize(
    ("z", "code"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, -1.0]),
        ([1.0, 2.0, -1.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1.0, 2.0, -1.0], [-1.0, -2.0, 1.0]),
        ([1e-9, 0.0, 0.0], [0.0, 1.0, 0.0]),
    ],
    ids=["z is 0", "code is 0", "both are", "opposite", "z is small"],
)
def test_where_there_is_no_rotation(z, code):
    """Theirs has no nan here, but 0, a reflection, or a factor of a million."""
    grad, their_grad, ct = rotated(z, code)
    np.testing.assert_array_equal(grad, ct)
    assert not np.allclose(their_grad, ct, atol=0.1)
