"""What the page of `quantize` leaves to its readers: indices, padding, levels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

q = sg.quantize


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


# Indices ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "lucidrains", "symmetric"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_indices_of_a_grid_are_all_different(variant, dtype):
    """Every code has its own, from 0 to their number; the page's two lines."""
    levels = np.array([8, 5, 2])
    places = np.array([1, 8, 40])
    each = [jnp.linspace(-9, 9, 300, dtype=jnp.float32)] * 3
    z = jnp.stack([jnp.tile(x, 2) for x in each], -1)
    z = jnp.concatenate(
        [
            jnp.stack([z[:, 0], z[::-1, 1], jnp.roll(z[:, 2], k)], -1)
            for k in (0, 37, 151, 299)
        ]
    )
    code = q.fsq(z.astype(dtype), levels, variant=variant).astype("float32")
    if variant == "symmetric":
        entries = jnp.round((code + 1) * (levels[None] - 1) / 2)
    else:
        entries = jnp.round(code * (levels // 2)[None] + (levels // 2)[None])
    entries = np.asarray(entries, int)
    assert entries.min(0).tolist() == [0, 0, 0]
    assert entries.max(0).tolist() == [7, 4, 1]
    indices = (entries * places).sum(-1)
    codes = [tuple(row) for row in np.asarray(code).tolist()]
    assert len(set(zip(indices.tolist(), codes, strict=True))) == len(set(codes))
    assert len(set(indices.tolist())) == len(set(codes))


def test_indices_of_signs():
    corners = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)), jnp.float32)
    for f in (q.lfq, q.bsq):
        indices = ((f(corners * 0.3) > 0) * 2 ** np.arange(4)[None]).sum(-1)
        assert sorted(indices.tolist()) == list(range(16))


# Padding ------------------------------------------------------------------------------


def masked_losses(z, codebook, mask):
    code = codebook[q.vector_quantize(z, codebook).indices]
    mean = lambda error: (error * mask[..., None]).sum() / (mask.sum() * z.shape[-1])
    stop = sg.stop_gradient
    return mean((stop(z) - code) ** 2), mean((z - stop(code)) ** 2)


def test_masked_losses_are_those_of_what_counts():
    z, codebook = normal(0, 5, 3), normal(1, 4, 3)
    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0], jnp.float32)
    kept = mask.astype(bool)
    out = q.vector_quantize(z[kept], codebook)
    masked = masked_losses(z, codebook, mask)
    np.testing.assert_allclose(
        masked, (out.codebook_loss, out.commitment_loss), rtol=1e-6
    )
    for k in (0, 1):
        ours = jax.grad(lambda z, c, k=k: masked_losses(z, c, mask)[k], (0, 1))
        theirs = jax.grad(lambda z, c, k=k: q.vector_quantize(z, c)[2 + k], (0, 1))
        dz, dcodebook = ours(z, codebook)
        kept_dz, kept_dcodebook = theirs(z[kept], codebook)
        np.testing.assert_allclose(dz[kept], kept_dz, atol=1e-6)
        np.testing.assert_array_equal(dz[~kept], 0)
        np.testing.assert_allclose(dcodebook, kept_dcodebook, atol=1e-6)


# Several levels -----------------------------------------------------------------------


def right(z, codebooks):
    left, total, losses = z, 0.0, []
    for codebook in codebooks:
        out = q.vector_quantize(left, codebook)
        code = sg.stop_gradient(out.quantized)
        left, total = left - code, total + code
        losses.append((out.codebook_loss, out.commitment_loss))
    return sg.replace_value(z, total), losses


def through(z, codebooks):
    """Each level's own gradient, added up."""
    left, total, losses = z, 0.0, []
    for codebook in codebooks:
        out = q.vector_quantize(left, codebook)
        left, total = left - sg.stop_gradient(out.quantized), total + out.quantized
        losses.append((out.codebook_loss, out.commitment_loss))
    return total, losses


def cancelled(z, codebooks):
    """What is left has no derivative."""
    left, total, losses = z, 0.0, []
    for codebook in codebooks:
        out = q.vector_quantize(left, codebook)
        left, total = left - out.quantized, total + out.quantized
        losses.append((out.codebook_loss, out.commitment_loss))
    return total, losses


Z = normal(0, 7, 3)
BOOKS = [normal(k, 9, 3) / 3**k for k in range(1, 5)]


def slopes(quantize):
    return jax.grad(lambda z: jnp.sum(quantize(z, BOOKS)[0]))(Z)


def test_the_gradient_of_a_residual_quantizer():
    """1 as written on the page; 4 for four levels, or by the first alone, else."""
    values = [f(Z, BOOKS)[0] for f in (right, through, cancelled)]
    for value in values[1:]:
        np.testing.assert_array_equal(value, values[0])
    np.testing.assert_array_equal(slopes(right), 1)
    np.testing.assert_array_equal(slopes(through), len(BOOKS))
    np.testing.assert_allclose(slopes(cancelled), 1)


@pytest.mark.parametrize("level", range(4))
def test_every_level_commits(level):
    """To what is left before it, less its code: 2 * (left - code) / size."""
    left = np.float64(Z)
    for book in BOOKS[: level + 1]:
        far = ((left[:, None] - np.float64(book)) ** 2).sum(-1)
        before, left = left, left - np.float64(book)[far.argmin(-1)]
    commits = lambda f: jax.grad(lambda z: f(z, BOOKS)[1][level][1])(Z)
    np.testing.assert_allclose(commits(right), 2 * left / Z.size, atol=1e-6)
    if level:  # naively, only the first
        np.testing.assert_allclose(commits(cancelled), 0, atol=1e-7)
    moves = jax.grad(lambda books: right(Z, books)[1][level][0])(BOOKS)
    indices = ((before[:, None] - np.float64(BOOKS[level])) ** 2).sum(-1).argmin(-1)
    expected = np.zeros(BOOKS[level].shape)
    np.add.at(expected, indices, -2 * left / Z.size)
    for k, move in enumerate(moves):
        np.testing.assert_allclose(move, expected if k == level else 0, atol=1e-6)
