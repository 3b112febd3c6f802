"""Which code is nearest: any offset, spread, size and dtype; equal codes; nan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, f32, mesh

import stopgrad_jax as sg

q = sg.quantize
search = jax.jit(lambda z, codes: q.vector_quantize(z, codes).indices)


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def distances(z, codes):
    """Return squared distances, in float64."""
    z, codes = np.float64(z), np.float64(codes)
    return ((z[..., None, :] - codes) ** 2).sum(-1)


def slack(z, codes, chosen, nearest):
    """Return by how much the docstring allows the chosen code to be farther."""
    z, codes, width = np.float64(z), np.float64(codes), codes.shape[1]
    # The middle: of a few codes, entry by entry.
    few = codes[:: -(-len(codes) // 15)]
    m = np.sort(few, 0)[(len(few) - 1) // 2]
    norm = lambda x: np.linalg.norm(x - m, axis=-1)
    r = np.maximum(norm(codes[chosen]), norm(codes[nearest]))
    return 2 * (width + 4) * np.finfo("float32").eps * r * (r + norm(z))


def assert_nearest(z, codes, allowed=0):
    """Check the promise, and that few ties are decided by rounding."""
    indices = np.asarray(search(z, codes))
    far = distances(z, codes)
    best = far.argmin(-1)
    excess = np.take_along_axis(far, indices[:, None], -1)[:, 0] - far.min(-1)
    assert np.all(excess <= slack(z, codes, indices, best))
    assert np.sum(indices != best) <= allowed


OFFSETS = [0.0, 1.0, 100.0, 1e3, -1e4, 1e5, 1e6]
SPREADS = [1e-3, 1.0, 1e3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_offset_and_spread(dtype):
    """As brute force in float64: what the codes and vectors share costs nothing."""
    for offset, spread in itertools.product(OFFSETS, SPREADS):
        if abs(offset) + 6 * spread > float(jnp.finfo(dtype).max):
            continue
        z, codes = (
            np.asarray(jnp.asarray(offset + spread * drawn(seed, n, 8), dtype))
            for seed, n in ((0, 500), (1, 64))
        )
        assert_nearest(z, codes, allowed=1)


def test_the_program_that_picked_wrong_codes():
    """By norm(code)**2 / 2 - dot(z, code) alone hundreds of 2,000 would be wrong."""
    z, codes = (np.float32(1000 + drawn(s, n, 16)) for s, n in ((0, 2000), (1, 256)))
    assert_nearest(z, codes)
    plain = np.sum(codes**2, -1) / 2 - z @ codes.T
    assert np.sum(plain.argmin(-1) != distances(z, codes).argmin(-1)) > 200


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_codes_far_from_the_origin_are_handed_on_bit_for_bit(gradient, run):
    z, codes = (f32(*(1e6 + drawn(s, n, 3))) for s, n in ((0, 50), (1, 9)))
    f = run(lambda z, c: q.vector_quantize(z, c, gradient=gradient))
    out = f(z, codes)
    assert_same_bits(out.quantized, codes[out.indices])
    # Of the losses and gradients nothing is moved to the middle.
    error = np.float64(z) - np.float64(codes)[out.indices]
    for loss in (out.codebook_loss, out.commitment_loss):
        np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-6)
    dz, dcodes = jax.grad(lambda z, c: sum(f(z, c)[2:]), (0, 1))(z, codes)
    np.testing.assert_allclose(dz, 2 * error / z.size, rtol=1e-6)
    pulled = np.zeros(codes.shape)
    np.add.at(pulled, np.asarray(out.indices), -2 * error / z.size)
    np.testing.assert_allclose(dcodes, pulled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e12, 1e30, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("place", [0, 7, 20])
def test_a_code_that_ran_away_confuses_no_other(far, place):
    z, codes = (np.float32(drawn(s, n, 8)) for s, n in ((0, 500), (1, 64)))
    codes[place] = far
    others = np.delete(np.arange(64), place)
    best = others[distances(z, codes[others]).argmin(-1)]
    assert np.sum(np.asarray(search(z, codes)) != best) == 0


def test_what_the_promise_leaves_open():
    """Clusters far from one another are compared no better than it says."""
    z, codes = (np.float32(drawn(s, n, 8)) for s, n in ((0, 500), (1, 64)))
    z[::2] += 1000
    codes[::2] += 1000
    assert_nearest(z, codes, allowed=len(z))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
def test_codes_of_any_size(size):
    """Squares of these would be 0 or infinite."""
    z, codes = (np.float32(size * drawn(s, n, 8)) for s, n in ((0, 500), (1, 64)))
    assert_nearest(z, codes, allowed=1)
    wide = np.asarray(jnp.asarray(codes, jnp.bfloat16))
    assert_nearest(np.asarray(jnp.asarray(z, jnp.bfloat16)), wide, allowed=1)


SHAPES = [(1, 3, 1), (3, 8, 7), (17, 8, 100), (37, 8, 100), (130, 257, 33)]


@pytest.mark.parametrize(("count", "width", "vectors"), SHAPES, ids=str)
def test_of_equal_codes_the_first(count, width, vectors):
    """Though a matrix product rounds equal columns apart, by their places."""
    codes = np.float32(drawn(0, count, width))
    for seed in range(1, 4):
        z = np.float32(drawn(seed, vectors, width))
        for offset in (0, 5):
            indices = search(z + offset, np.concatenate([codes + offset] * 3))
            assert np.all(indices < count)
            best = distances(z + offset, codes + offset).argmin(-1)
            assert np.sum(indices != best) <= 1


def test_equally_near_codes():
    codes = f32(0.0, 2.0, 4.0, -2.0)[:, None]
    z = f32(1.0, -1.0, 3.0, 100.0)[:, None]
    np.testing.assert_array_equal(search(z, codes), [0, 0, 1, 2])
    np.testing.assert_array_equal(search(z + 1024, codes + 1024), [0, 0, 1, 2])
    np.testing.assert_array_equal(search(z, 0 * codes), 0)
    np.testing.assert_array_equal(search(z, codes[:1]), 0)


NAN, INF = np.nan, np.inf


def test_nan_and_infinity(run):
    codes = f32([NAN, 0], [1, 1], [4, INF], [6, 6], [1, 1])
    z = f32([0, 0], [5, 5], [NAN, 1], [INF, 7], [-INF, NAN])
    out = run(q.vector_quantize)(z, codes)
    # Not by an entry that is no number; never a code that has one.
    assert out.indices[:2].tolist() == [1, 3]
    assert set(out.indices.tolist()) <= {1, 3}
    np.testing.assert_array_equal(jnp.isnan(out.quantized), jnp.isnan(z))
    assert jnp.isnan(out.codebook_loss)
    for k, entry in ((2, 1), (3, 7)):  # as if the other lay at the middle, 4
        middle = z[k].at[0].set(np.sort(np.float64(codes[:, 0]))[2])
        assert out.indices[k] == search(middle, codes), entry
    # Of codes that are all so, the first.
    np.testing.assert_array_equal(search(z, codes[::2][:2]), 0)
    gradient = jax.grad(lambda z: jnp.sum(q.vector_quantize(z, codes).quantized))(z)
    np.testing.assert_array_equal(gradient, 1)


def test_a_code_of_nan_gets_no_gradient_and_gives_none():
    codes = f32([NAN, 0], [1, 1], [4, 4])
    z = f32([0.5, 0.5], [3, 3])
    loss = lambda z, c: sum(q.vector_quantize(z, c, gradient="rotation")[2:])
    dz, dcodes = jax.grad(loss, (0, 1))(z, codes)
    assert np.isfinite(dz).all()
    np.testing.assert_array_equal(dcodes[0], 0)
    assert np.isfinite(dcodes).all()


def test_everywhere_the_same():
    """Also where every example has its own codebook."""
    z, codes = (np.float32(1e3 + drawn(s, n, 3)) for s, n in ((0, 8), (1, 6)))
    expected = distances(z, codes).argmin(-1)
    np.testing.assert_array_equal(jax.vmap(search, (0, None))(z, codes), expected)
    many = np.stack([codes + k for k in range(8)])
    own = jax.vmap(search)(z + np.float32(np.arange(8))[:, None], many)
    np.testing.assert_array_equal(own, expected)
    np.testing.assert_array_equal(jax.lax.map(lambda z: search(z, codes), z), expected)
    for check in (True, False):
        shards = jax.shard_map(
            search,
            mesh=mesh(),
            in_specs=(P("d"), P()),
            out_specs=P("d"),
            check_vma=check,
        )
        np.testing.assert_array_equal(jax.jit(shards)(z, codes), expected)


def test_rotation_where_it_is_its_code_and_for_one_cotangent():
    """It is straight-through there; elsewhere it depends on where z is."""
    code, ct = f32([0.6, -0.8, 0.3]), f32(1.0, 2.0, 3.0)
    f = lambda z: q.vector_quantize(z, code, gradient="rotation").quantized
    pull = lambda z: jax.vjp(f, z)[1](ct)[0]
    np.testing.assert_allclose(pull(code[0]), ct, rtol=1e-5)
    assert not np.allclose(pull(f32(1.0, 0.0, 0.0)), pull(f32(0.0, 1.0, 0.0)))


@pytest.mark.parametrize(("degrees", "turns"), [(0.05, False), (0.1, True)])
def test_how_near_to_opposite_there_is_no_rotation(degrees, turns):
    angle = np.radians(180 - degrees)
    code, ct = f32([np.cos(angle), np.sin(angle)]), f32(1.0, 2.0)
    f = lambda z: q.vector_quantize(z, code, gradient="rotation").quantized
    got = jax.vjp(f, f32(1.0, 0.0))[1](ct)[0]
    assert np.array_equal(got, ct) != turns
