"""Quantizers of vectors: grids, signs, codebooks and the rotation trick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, mesh

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "
q = sg.quantize


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


# lfq and bsq ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lfq_is_the_sign_with_minus_one_at_zero(dtype, run):
    z = every_value(dtype)
    value, vjp = jax.vjp(run(q.lfq), z)
    known = ~jnp.isnan(z)
    # Subnormal numbers are 0 where XLA flushes them.
    clear = known & (jnp.abs(z).astype("float32") >= jnp.finfo("float32").tiny)
    assert_same_bits(value[clear], jnp.where(z > 0, 1, -1).astype(dtype)[clear])
    assert set(np.unique(np.float32(value[known])).tolist()) == {-1.0, 1.0}
    assert jnp.isnan(value[~known]).all()
    np.testing.assert_array_equal(vjp(jnp.full_like(z, 3))[0], 3)
    np.testing.assert_array_equal(run(q.lfq)(f32(-0.0, 0.0)), -1)


def test_bsq_is_its_definition(run):
    z = normal(0, 50, 7)
    f = run(q.bsq)
    np.testing.assert_allclose(f(z), np.where(z > 0, 1, -1) / np.sqrt(7), rtol=1e-6)
    sphere = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    ct = jnp.cos(z)
    expected = jax.vjp(sphere, z)[1](ct)[0]
    np.testing.assert_allclose(jax.vjp(f, z)[1](ct)[0], expected, atol=1e-6)
    tangent = jax.jvp(f, (z,), (ct,))[1]
    np.testing.assert_allclose(tangent, jax.jvp(sphere, (z,), (ct,))[1], atol=1e-6)
    # The gradient never points along z.
    np.testing.assert_allclose(jnp.sum(expected * z, -1), 0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_how_far_bsq_is_from_the_sphere(width):
    """At most as far as an axis is, for which that is attained."""
    z = jnp.concatenate([normal(0, 2000, width), jnp.eye(width, dtype="float32")])
    point = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    apart = np.linalg.norm(q.bsq(z) - point, axis=-1)
    most = np.sqrt(2 - 2 / np.sqrt(width))
    assert apart.max() <= most + 1e-6
    np.testing.assert_allclose(apart[-width:], most, atol=1e-6)


def test_bsq_of_any_size_and_of_nothing(run):
    z, ct = normal(1, 5), f32(1.0, 2.0, 3.0, 4.0, 5.0)
    f = run(q.bsq)
    expected = jax.vjp(f, z)[1](ct)[0]
    for size in (1e-30, 1e30):  # squares of these are 0 and inf
        got = jax.vjp(f, z * size)[1](ct)[0]
        np.testing.assert_allclose(got * size, expected, rtol=1e-5, atol=1e-7)
    zero = jnp.zeros(5, jnp.float32)
    np.testing.assert_allclose(f(zero), -1 / np.sqrt(5), rtol=1e-6)
    np.testing.assert_array_equal(jax.vjp(f, zero)[1](ct)[0], ct)


# vector_quantize ------------------------------------------------------------------


def nearest_by_hand(z, codebook):
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    distances = ((z[..., None, :] - codebook) ** 2).sum(-1)
    return distances.argmin(-1)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_code_is_the_nearest_and_the_losses_are_its(gradient, run):
    z, codebook = normal(0, 4, 30, 6), normal(1, 17, 6)
    f = run(lambda z, c: q.vector_quantize(z, c, gradient=gradient))
    out, indices = f(z, codebook), nearest_by_hand(z, codebook)
    np.testing.assert_array_equal(out.indices, indices)
    assert out.indices.dtype == jnp.int32
    np.testing.assert_array_equal(out.quantized, codebook[indices])
    mean = np.mean((np.asarray(z) - np.asarray(codebook)[indices]) ** 2)
    np.testing.assert_allclose(out.codebook_loss, mean, rtol=1e-6)
    np.testing.assert_allclose(out.commitment_loss, mean, rtol=1e-6)
    one = f(z[0, 0], codebook)
    assert one.indices.shape == ()
    np.testing.assert_array_equal(one.quantized, out.quantized[0, 0])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_each_output_trains_its_own(gradient):
    z, codebook = normal(0, 30, 6), normal(1, 17, 6)
    f = lambda z, c: q.vector_quantize(z, c, gradient=gradient)
    part = lambda name: lambda z, c: jnp.sum(getattr(f(z, c), name))
    ask = lambda name: sg.gradients(part(name), ["z", "c"])(z, codebook)
    indices = f(z, codebook).indices
    off = 2 * (np.asarray(z) - np.asarray(codebook)[indices]) / z.size
    moved = np.zeros_like(codebook)
    np.add.at(moved, indices, -off)
    dz, dc = ask("codebook_loss")
    assert dz is None
    np.testing.assert_allclose(dc, moved, atol=1e-6)
    dz, dc = ask("commitment_loss")
    np.testing.assert_allclose(dz, off, atol=1e-6)
    assert dc is None
    dz, dc = ask("quantized")
    assert dc is None
    if gradient == "straight_through":
        np.testing.assert_array_equal(dz, 1)


def rotation_by_hand(e, code):
    """Return the matrix lam * R in float64, R by its definition."""
    e, code = np.asarray(e, np.float64), np.asarray(code, np.float64)
    unit, target = e / np.linalg.norm(e), code / np.linalg.norm(code)
    w = (unit + target) / np.linalg.norm(unit + target)
    r = np.eye(e.size) - 2 * np.outer(w, w) + 2 * np.outer(target, unit)
    np.testing.assert_allclose(r @ r.T, np.eye(e.size), atol=1e-12)
    np.testing.assert_allclose(r @ unit, target, atol=1e-12)
    return np.linalg.norm(code) / np.linalg.norm(e) * r


def rotated(z, code):
    """Quantize to the only code there is."""
    return q.vector_quantize(z, code[None], gradient="rotation").quantized


def test_rotation_is_its_definition(run):
    for seed in range(5):
        z, code, ct = normal(seed, 6), 3 * normal(seed + 10, 6), normal(seed + 20, 6)
        f = run(lambda z, code=code: rotated(z, code))
        value, vjp = jax.vjp(f, z)
        np.testing.assert_array_equal(value, code)
        matrix = rotation_by_hand(z, code)
        np.testing.assert_allclose(
            vjp(ct)[0], matrix.T @ np.asarray(ct), rtol=2e-5, atol=2e-5
        )
        tangent = jax.jvp(f, (z,), (ct,))[1]
        np.testing.assert_allclose(
            tangent, matrix @ np.asarray(ct), rtol=2e-5, atol=2e-5
        )


def test_rotation_keeps_angles():
    """The gradient's angle to the code becomes its angle to z, and lengths scale."""
    z, code, ct = normal(0, 8), normal(1, 8), normal(2, 8)
    got = jax.vjp(lambda z: rotated(z, code), z)[1](ct)[0]
    cos = lambda a, b: jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    np.testing.assert_allclose(cos(got, z), cos(ct, code), atol=1e-6)
    lam = jnp.linalg.norm(code) / jnp.linalg.norm(z)
    np.testing.assert_allclose(
        jnp.linalg.norm(got), lam * jnp.linalg.norm(ct), rtol=1e-5
    )


UNIT = f32(0.6, 0.8, 0.0)
NO_ROTATION = {
    "z is 0": (0 * UNIT, UNIT),
    "code is 0": (UNIT, 0 * UNIT),
    "both are 0": (0 * UNIT, 0 * UNIT),
    "z is nothing beside it": (1e-9 * UNIT, UNIT),
    "code is nothing beside it": (UNIT, 1e-9 * UNIT),
    "opposite": (UNIT, -UNIT),
    "opposite and longer": (UNIT, -3 * UNIT),
    "almost opposite": (UNIT, -UNIT + f32(0, 0, 1e-6)),
}


@pytest.mark.parametrize(("z", "code"), NO_ROTATION.values(), ids=NO_ROTATION)
def test_where_there_is_no_rotation_the_gradient_passes(z, code, run):
    ct = f32(1.0, 2.0, 3.0)
    value, vjp = jax.vjp(run(lambda z: rotated(z, code)), z)
    np.testing.assert_array_equal(value, code)
    np.testing.assert_array_equal(vjp(ct)[0], ct)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_rotation_of_vectors_of_any_size(size):
    z, code, ct = normal(0, 6), normal(1, 6), normal(2, 6)
    pull = lambda z, code: jax.vjp(lambda z: rotated(z, code), z)[1](ct)[0]
    got, expected = pull(z * size, code * size), pull(z, code)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_rotation_near_its_edges_is_finite_and_true():
    """One degree from opposite it is a rotation still, to 4 digits."""
    angles = np.radians([1e-3, 0.3, 179.0, 179.8])
    ct = f32(1.0, 2.0)
    for angle in angles:
        z, code = f32(1.0, 0.0), f32(np.cos(angle), np.sin(angle))
        got = jax.vjp(lambda z, code=code: rotated(z, code), z)[1](ct)[0]
        expected = rotation_by_hand(z, code).T @ np.asarray(ct)
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_quantizing_codes_gives_themselves():
    codebook = normal(0, 64, 8)
    out = q.vector_quantize(codebook, codebook, gradient="rotation")
    np.testing.assert_array_equal(out.indices, np.arange(64))
    assert out.codebook_loss == out.commitment_loss == 0
    twins = jnp.concatenate([codebook, codebook])
    np.testing.assert_array_equal(
        q.vector_quantize(codebook, twins).indices, np.arange(64)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_narrow_codes(gradient, dtype, run):
    """Narrow in, narrow out; the codebook may be wider; losses are float32."""
    z, codebook = normal(0, 30, 4).astype(dtype), normal(1, 9, 4)
    f = run(lambda z, c: q.vector_quantize(z, c, gradient=gradient))
    out = f(z, codebook)
    assert out.quantized.dtype == dtype
    assert out.codebook_loss.dtype == out.commitment_loss.dtype == jnp.float32
    assert_same_bits(out.quantized, codebook[out.indices].astype(dtype))

    def loss(z, c):
        out = f(z, c)
        return out.quantized.astype("float32").sum() + out.codebook_loss

    dz, dc = jax.grad(loss, (0, 1))(z, codebook)
    assert (dz.dtype, dc.dtype) == (dtype, jnp.float32)
    assert np.isfinite(np.float32(dz)).all()
    assert f(z, codebook.astype(dtype)).quantized.dtype == dtype


def test_nan_is_not_lost(run):
    z = f32(0.1, jnp.nan, 0.2)
    for f in (
        lambda z: q.fsq(z, (5, 5, 5)),
        q.lfq,
        lambda z: q.vector_quantize(z, normal(0, 4, 3)).quantized,
        lambda z: q.vector_quantize(z, normal(0, 4, 3), gradient="rotation").quantized,
    ):
        np.testing.assert_array_equal(jnp.isnan(run(f)(z)), [False, True, False])
    assert jnp.isnan(run(q.bsq)(z))[1]
    assert jnp.isnan(q.vector_quantize(z, normal(0, 4, 3)).codebook_loss)


# All of them ----------------------------------------------------------------------

CODES = normal(5, 6, 3)
ALL = {
    "fsq": lambda z: q.fsq(z, (8, 5, 3)),
    "fsq lucidrains": lambda z: q.fsq(z, (8, 5, 3), variant="lucidrains"),
    "lfq": q.lfq,
    "bsq": q.bsq,
    "straight through": lambda z: q.vector_quantize(z, CODES).quantized,
    "rotation": lambda z: q.vector_quantize(z, CODES, gradient="rotation").quantized,
}


@pytest.mark.parametrize("f", ALL.values(), ids=ALL)
def test_everywhere(f):
    """One meaning under vmap, scan, map, checkpoint, cond and shard_map."""
    z = 2 * normal(0, 8, 3)
    shards = lambda check: jax.shard_map(
        f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=check
    )
    programs = {
        "vmap": jax.vmap(f),
        "scan": lambda z: jax.lax.scan(lambda c, z: (c, f(z)), 0, z)[1],
        "map": lambda z: jax.lax.map(f, z),
        "checkpoint": jax.checkpoint(f),
        "cond": lambda z: jax.lax.cond(z[0, 0] < 99, f, lambda z: z, z),
        "jit": jax.jit(f),
    }
    loss = lambda f: lambda z: jnp.sum((f(z) - z) ** 2)
    slopes_of = {name: jax.grad(loss(program)) for name, program in programs.items()}
    if not jax.config.jax_check_tracer_leaks:
        # Jitted: eager, each operation is compiled for eight devices.
        for name, program in {
            "checked": shards(True),
            "unchecked": shards(False),
        }.items():
            programs[name] = jax.jit(program)
            slopes_of[name] = jax.jit(jax.grad(loss(program)))
    expected, slopes = f(z), jax.grad(loss(f))(z)
    for name, program in programs.items():
        np.testing.assert_allclose(program(z), expected, rtol=1e-6, err_msg=name)
        got = slopes_of[name](z)
        np.testing.assert_allclose(got, slopes, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_codebook_learns_in_vmap_and_shard_map():
    z = normal(0, 8, 3)
    loss = lambda c, z: sum(q.vector_quantize(z, c)[2:])
    expected = jax.grad(loss)(CODES, z)
    mapped = lambda c, z: jnp.mean(jax.vmap(loss, (None, 0))(c, z))
    np.testing.assert_allclose(jax.grad(mapped)(CODES, z), expected, rtol=1e-5)
    if jax.config.jax_check_tracer_leaks:
        return  # JAX reports grad of shard_map as a leak (tests/test_jax.py)
    shards = jax.shard_map(
        lambda c, z: jax.lax.pmean(loss(c, z), "d"),
        mesh=mesh(),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.grad(shards)(CODES, z), expected, rtol=1e-5)


# Bad input ------------------------------------------------------------------------

Z = normal(0, 5, 3)
BAD = {
    r"lfq\(z\): z is an array": (TypeError, lambda: q.lfq(jnp.arange(3))),
    r"bsq\(z\): z is an array": (TypeError, lambda: q.bsq(jnp.arange(3))),
    r"bsq\(z\): z has at least 1 axis": (ValueError, lambda: q.bsq(1.0)),
    r"codebook has the shape \(codes, 3\)": (
        ValueError,
        lambda: q.vector_quantize(Z, jnp.ones((7, 4))),
    ),
    r"codebook has the shape \(codes, 3\), for z of f32\[3\]": (
        ValueError,
        lambda: q.vector_quantize(Z[0], jnp.ones(3)),
    ),
    r"codebook has the shape[\s\S]*f32\[5,3\]": (
        ValueError,
        lambda: q.vector_quantize(Z, jnp.ones((0, 3))),
    ),
    "codebook is an array of real floats": (
        TypeError,
        lambda: q.vector_quantize(Z, jnp.ones((7, 3), int)),
    ),
    r"vector_quantize\([\s\S]*z is an array": (
        TypeError,
        lambda: q.vector_quantize(jnp.ones((2, 3), int), Z),
    ),
    r"vector_quantize\([\s\S]*z has at least 1 axis": (
        ValueError,
        lambda: q.vector_quantize(1.0, Z),
    ),
    'gradient is "straight_through" or "rotation"': (
        ValueError,
        lambda: q.vector_quantize(Z, Z, gradient="other"),
    ),
}


@pytest.mark.parametrize(("words", "case"), BAD.items(), ids=range(len(BAD)))
def test_bad_input(words, case):
    kind, call = case
    with pytest.raises(kind, match=words + BEATS):
        call()
