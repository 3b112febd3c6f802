"""Quantizers of numbers: rounding, fake quantization, a step that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, instructions, mesh

import stopgrad_jax as sg

q = sg.quantize

# Name: (ours, the value by hand); the gradient is the identity.
IDENTITIES = {
    "round": (q.round, jnp.round),
    "floor": (q.floor, jnp.floor),
    "ceil": (q.ceil, jnp.ceil),
    "trunc": (q.trunc, jnp.trunc),
    "clip": (
        lambda x: q.clip(x, -1.5, 2),
        lambda x: jnp.clip(x, jnp.full_like(x, -1.5), jnp.full_like(x, 2)),
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("ours", "value"), IDENTITIES.values(), ids=IDENTITIES)
def test_values_are_exact_and_gradients_pass(ours, value, dtype, run):
    x = every_value(dtype)
    out, vjp = jax.vjp(run(ours), x)
    assert_same_bits(out, run(value)(x))
    np.testing.assert_array_equal(vjp(jnp.full_like(x, 3))[0], 3)
    np.testing.assert_array_equal(
        jax.jvp(run(ours), (x,), (jnp.full_like(x, 3),))[1], 3
    )
    np.testing.assert_array_equal(jnp.isnan(out), jnp.isnan(x))


@pytest.mark.parametrize(("ours", "value"), IDENTITIES.values(), ids=IDENTITIES)
def test_to_every_order_as_the_identity(ours, value):
    f = lambda x: ours(x) ** 3
    rounded = value(1.3)
    for one in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(one(f)(1.3), 3 * rounded**2)
        for two in (jax.grad, jax.jacfwd):
            np.testing.assert_allclose(two(one(f))(1.3), 6 * rounded)


def test_clip_lets_come_back_and_its_bounds_do_not_learn():
    f = lambda x, lo, hi: q.clip(x, lo, hi).sum()
    x, lo = f32(-3.0, 0.0, 3.0), f32(-1.0, -1.0, 0.5)
    gradients = sg.gradients(f, ["x", "lo", "hi"])(x, lo, 1.0)
    np.testing.assert_array_equal(gradients[0], 1)
    assert gradients[1:] == [None, None]
    # Bounds of a wider type do not widen a bfloat16.
    assert q.clip(x.astype(jnp.bfloat16), lo, 1).dtype == jnp.bfloat16


# fake_quant -----------------------------------------------------------------------


def fake_quant_by_hand(x, low, high, bits, narrow):
    """Jacob et al., in float64: the value, and where x, min and max learn."""
    x, low, high = (np.asarray(v, np.float64) for v in (x, low, high))
    qmin, qmax = int(narrow), 2**bits - 1
    s = (high - low) / (qmax - qmin)
    z = np.clip(np.floor(qmin - low / s + 0.5), qmin, qmax)
    first, last = (qmin - z) * s, (qmax - z) * s
    value = np.floor((np.clip(x, first, last) - first) / s + 0.5) * s + first
    return value, (x >= first) & (x <= last), x < first, x > last


RANGES = {
    "symmetric": (-6.0, 6.0),
    "of one": (-1.0, 1.0),
    "askew": (-1.3, 4.7),
    "positive": (2.0, 6.0),
    "negative": (-6.0, -2.0),
    "from zero": (0.0, 3.0),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["full", "narrow"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(("low", "high"), RANGES.values(), ids=RANGES)
def test_fake_quant_is_its_definition(low, high, bits, narrow):
    x = jax.random.uniform(jax.random.key(0), (997,), minval=-8, maxval=8)
    x = x.astype(jnp.float32)
    f = jax.jit(lambda x, a, b: q.fake_quant(x, a, b, bits, narrow))
    value, inside, below, above = fake_quant_by_hand(x, low, high, bits, narrow)
    np.testing.assert_allclose(f(x, low, high), value, rtol=1e-6, atol=2e-6)
    ct = jnp.sin(jnp.arange(997.0, dtype=jnp.float32))
    loss = lambda *args: jnp.vdot(ct, f(*args))
    dx, dlow, dhigh = jax.grad(loss, (0, 1, 2))(x, low, high)
    np.testing.assert_array_equal(dx, np.where(inside, ct, 0))
    np.testing.assert_allclose(dlow, np.asarray(ct) @ below, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dhigh, np.asarray(ct) @ above, rtol=1e-5, atol=1e-5)
    tangent = jax.jvp(f, (x, low, high), (ct, 2.0, 3.0))[1]
    np.testing.assert_allclose(
        tangent, np.where(inside, ct, 2.0 * below + 3.0 * above), rtol=1e-6
    )


def test_fake_quant_nudges_the_range():
    ends = lambda *args: q.fake_quant(f32(-9.0, 0.0, 9.0), *args)
    np.testing.assert_allclose(ends(-6.0, 6.0), [-128 * 12 / 255, 0, 127 * 12 / 255])
    np.testing.assert_allclose(ends(-6.0, 6.0, 8, True), [-6, 0, 6], rtol=1e-6)
    np.testing.assert_allclose(ends(2.0, 6.0), [0, 0, 4])
    # The higher zero point for every symmetric range, whatever its rounding errors.
    for bits in (1, 2, 4, 8):
        tops = jax.random.uniform(jax.random.key(1), (500,), minval=0.1, maxval=9.0)
        tops = tops.astype(jnp.float32)
        lowest = q.fake_quant(jnp.full((500,), -99, jnp.float32), -tops, tops, bits)
        code = np.asarray(lowest) / np.asarray(tops) * (2**bits - 1) / 2
        np.testing.assert_allclose(code, -(2 ** (bits - 1)), rtol=1e-5)


def test_fake_quant_of_zero_is_zero(run):
    lows = -jax.random.uniform(jax.random.key(0), (999,), minval=0.01, maxval=9)
    highs = jax.random.uniform(jax.random.key(1), (999,), minval=0.01, maxval=9)
    zeros = jnp.zeros_like(lows)
    np.testing.assert_array_equal(run(q.fake_quant)(zeros, lows, highs), 0)


def test_fake_quant_of_data_that_are_all_equal(run):
    """Not nan but the limit, 0; and as TensorFlow where the range is 0 to 0."""
    f = run(lambda x: q.fake_quant(x, x.min(), x.max()))
    for c in (0.0, 3.0, -3.0):
        x = jnp.full((4,), c, jnp.float32)
        np.testing.assert_array_equal(f(x), 0)
        assert np.isfinite(jax.grad(lambda x: f(x).sum())(x)).all()
    g = lambda x, a, b: run(q.fake_quant)(x, a, b).sum()
    zero, x = jnp.zeros(()), f32(-1.0, 0.0, 2.0)
    dx, *ends = jax.grad(g, (0, 1, 2))(x, zero, zero)
    np.testing.assert_array_equal(dx, 1)
    assert ends == [0, 0]


def test_fake_quant_per_channel_and_mapped():
    x = jax.random.normal(jax.random.key(0), (5, 3), jnp.float32) * 4
    low, high = f32(-1.0, -2.0, -4.0), f32(1.0, 3.0, 2.0)
    whole = lambda x, a, b: q.fake_quant(x, a, b).sum()
    columns = lambda x, a, b: jax.vmap(q.fake_quant, (1, 0, 0))(x, a, b).sum()
    rows = lambda x, a, b: jax.vmap(q.fake_quant, (0, None, None))(x, a, b).sum()
    expected = jax.grad(whole, (0, 1, 2))(x, low, high)
    for other in (columns, rows):
        got = jax.grad(other, (0, 1, 2))(x, low, high)
        jax.tree.map(np.testing.assert_allclose, got, expected)
    assert expected[1].shape == (3,)


# fake_quant_affine ----------------------------------------------------------------


def test_affine_is_its_definition(run):
    x = jnp.linspace(-9, 9, 1003, dtype=jnp.float32)
    for scale, zero, qmin, qmax in (
        (0.25, 0, -8, 7),
        (0.3, 3, 0, 15),
        (0.05, 128, 0, 255),
    ):
        f = run(lambda x, s, z, a=qmin, b=qmax: q.fake_quant_affine(x, s, z, a, b))
        code = np.round(np.asarray(x) * (1 / np.float32(scale))) + zero
        value = (np.clip(code, qmin, qmax) - zero) * np.float32(scale)
        np.testing.assert_allclose(f(x, scale, zero), value, rtol=1e-6)
        loss = lambda *args, f=f: f(*args).sum()
        dx, ds, dz = jax.grad(loss, (0, 1, 2))(x, scale, float(zero))
        np.testing.assert_array_equal(dx, (code >= qmin) & (code <= qmax))
        assert ds == dz == 0
        tangent = jax.jvp(lambda x, f=f, s=scale, z=zero: f(x, s, z), (x,), (x,))[1]
        np.testing.assert_array_equal(tangent, np.where(dx, x, np.float32(0)))


def test_affine_at_its_edges():
    """Half to even; the mask is on the rounded code, half a step past the range."""
    f = lambda x: q.fake_quant_affine(x, 1.0, 0, -2, 1)
    x = f32(-3.0, -2.5, -2.4, 0.5, 1.0, 1.4, 1.5, 2.0)
    np.testing.assert_array_equal(f(x), [-2, -2, -2, 0, 1, 1, 1, 1])
    slopes = jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_array_equal(slopes, [0, 1, 1, 1, 1, 1, 0, 0])
    halves = q.fake_quant_affine(f32(0.5, 1.5, 2.5), 1.0, 0, -8, 7)
    np.testing.assert_array_equal(halves, [0, 2, 2])


# lsq ------------------------------------------------------------------------------


@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (0, 15), (-1, 1)])
def test_lsq_is_its_definition(qmin, qmax, run):
    x = jax.random.normal(jax.random.key(0), (501,), jnp.float32) * 3
    step, n = 0.37, 77
    f = run(lambda x, s: q.lsq(x, s, qmin, qmax, num_elements=n))
    v = np.asarray(x, np.float64) / step
    code = np.round(np.clip(v, qmin, qmax))
    np.testing.assert_allclose(f(x, step), code * step, rtol=1e-6)
    ct = jnp.cos(jnp.arange(501.0, dtype=jnp.float32))
    loss = lambda *args: jnp.vdot(ct, f(*args))
    dx, dstep = jax.grad(loss, (0, 1))(x, step)
    inside = (v > qmin) & (v < qmax)
    np.testing.assert_array_equal(dx, np.where(inside, ct, 0))
    slope = np.where(inside, code - v, np.clip(v, qmin, qmax)) / np.sqrt(n * qmax)
    np.testing.assert_allclose(dstep, np.asarray(ct) @ slope, rtol=1e-4)
    tangent = jax.jvp(f, (x, step), (ct, 1.0))[1]
    np.testing.assert_allclose(tangent, np.where(inside, ct, 0) + slope, atol=1e-5)


def test_lsq_at_its_ends():
    """An end itself is outside, as in the paper."""
    f = lambda x, s: q.lsq(x, s, -2, 1, num_elements=1).sum()
    for x, dx, dstep in ((-1.0, 0, -2), (0.5, 0, 1), (0.25, 1, -0.5), (0.0, 1, 0)):
        assert jax.grad(f, (0, 1))(f32(x), 0.5) == (dx, dstep)


def test_lsq_is_that_of_the_composition_to_second_order():
    """As if written with a rounding of slope 1, of which it is the closed form."""
    x, weights = f32(-3.0, -0.4, 0.3, 0.8, 2.9), f32(1.0, 2.0, 3.0, 4.0, 5.0)

    def composed(x, s):
        clipped = jnp.clip(x / s, -2, 1)
        return jnp.vdot(weights, sg.straight_through(jnp.round)(clipped) * s)

    ours = lambda x, s: jnp.vdot(weights, q.lsq(x, s, -2, 1, num_elements=1))
    square = lambda f: lambda x, s: f(x, s) ** 2
    for first in (jax.grad, jax.jacfwd):
        for second in (jax.jacrev, jax.jacfwd):
            got = second(first(square(ours), (0, 1)), (0, 1))(x, 0.5)
            expected = second(first(square(composed), (0, 1)), (0, 1))(x, 0.5)
            for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_lsq_is_per_example_under_vmap():
    """The step's gradient is the sum of the examples', for num_elements is given."""
    xs = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)
    f = lambda s, x: q.lsq(x, s, -4, 3, num_elements=4).sum()
    mapped = jax.grad(lambda s: jax.vmap(f, (None, 0))(s, xs).sum())(0.3)
    each = jax.vmap(jax.grad(f), (None, 0))(0.3, xs)
    np.testing.assert_allclose(mapped, each.sum(), rtol=1e-5)
    np.testing.assert_allclose(mapped, sum(jax.grad(f)(0.3, x) for x in xs), rtol=1e-5)
    np.testing.assert_allclose(mapped, jax.grad(f)(0.3, xs), rtol=1e-5)


def test_lsq_init():
    x = f32(-1.0, 2.0, 3.0)
    assert q.lsq_init(x, 4) == 2
    assert q.lsq_init(x.astype(jnp.bfloat16), 4).dtype == jnp.bfloat16
    zeros = jnp.zeros(3, jnp.float32)
    step = q.lsq_init(zeros, 4)
    assert step > 0
    np.testing.assert_array_equal(q.lsq(zeros, step, -4, 4, num_elements=3), 0)
    assert jnp.isnan(q.lsq_init(f32(jnp.nan), 4))


def test_a_step_that_learns_finds_the_best():
    """From a start 5 times too large, for normal weights in 3 bits."""
    w = jax.random.normal(jax.random.key(0), (4096,), jnp.float32)
    code = lambda s: q.lsq(w, s, -4, 3, num_elements=1)
    error = lambda s: jnp.mean((code(s) - w) ** 2)
    step = lambda s, _: (s - 0.01 * jax.grad(error)(s), None)
    learned = jax.jit(lambda s: jax.lax.scan(step, s, None, length=2000)[0])(2.5)
    steps = jnp.linspace(0.2, 1.5, 400, dtype="float32")
    least = jnp.min(jax.lax.map(error, steps))
    assert error(learned) < 1.02 * least


# All of them ----------------------------------------------------------------------

STEP = f32(0.3)[0]
ALL = {
    **{name: ours for name, (ours, _) in IDENTITIES.items()},
    "fake_quant": lambda x: q.fake_quant(x, -1.5, 2.0),
    "fake_quant narrow": lambda x: q.fake_quant(x, -1.5, 2.0, 4, True),
    "affine": lambda x: q.fake_quant_affine(x, 0.25, 1, -8, 7),
    "lsq": lambda x: q.lsq(x, STEP, -8, 7, num_elements=3),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("f", ALL.values(), ids=ALL)
def test_narrow_types_are_those_of_float32_rounded_once(f, dtype, run):
    x = every_value(dtype)
    wide = run(f)(x.astype("float32")).astype(dtype)
    tiny = float(jnp.finfo("bfloat16").tiny)  # XLA may flush what is below
    assert f(x).dtype == dtype
    np.testing.assert_allclose(
        np.float32(run(f)(x)), np.float32(wide), rtol=0, atol=tiny
    )
    np.testing.assert_array_equal(jnp.isnan(f(x)), jnp.isnan(x))
    slopes = jax.grad(lambda x: f(x).astype("float32").sum())(x)
    assert slopes.dtype == dtype
    assert set(np.unique(slopes.astype("float32")).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("f", ALL.values(), ids=ALL)
def test_everywhere(f):
    """One meaning under vmap, scan, map, checkpoint, cond and shard_map."""
    x = (jax.random.normal(jax.random.key(0), (8, 3)) * 3).astype(jnp.float32)
    shards = jax.shard_map(f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
    unchecked = jax.shard_map(
        f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=False
    )
    programs = {
        "vmap": jax.vmap(f),
        "scan": lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
        "map": lambda x: jax.lax.map(f, x),
        "checkpoint": jax.checkpoint(f),
        "cond": lambda x: jax.lax.cond(x[0, 0] < 99, f, lambda x: x, x),
        "jit": jax.jit(f),
    }
    loss = lambda f: lambda x: jnp.sum(f(x) ** 2)
    slopes_of = {name: jax.grad(loss(program)) for name, program in programs.items()}
    if not jax.config.jax_check_tracer_leaks:
        # Jitted: eager, each operation is compiled for eight devices.
        for name, program in {"shard_map": shards, "unchecked": unchecked}.items():
            programs[name] = jax.jit(program)
            slopes_of[name] = jax.jit(jax.grad(loss(program)))
    expected, slopes = f(x), jax.grad(loss(f))(x)
    for name, program in programs.items():
        np.testing.assert_allclose(program(x), expected, rtol=1e-6, err_msg=name)
        got = slopes_of[name](x)
        np.testing.assert_allclose(got, slopes, rtol=1e-6, err_msg=name)


def test_parameters_learn_in_shard_map():
    if jax.config.jax_check_tracer_leaks:
        return  # JAX reports grad of shard_map as a leak (tests/test_jax.py)
    x = (jax.random.normal(jax.random.key(0), (8, 3)) * 3).astype(jnp.float32)

    def total(step, low, high, x):
        a = q.lsq(x, step, -4, 3, num_elements=3)
        return jnp.sum((a + q.fake_quant(x, low, high)) ** 2)

    def of_shard(*args):
        return jax.lax.psum(total(*args), "d")

    specs = (P(), P(), P(), P("d"))
    shards = jax.shard_map(of_shard, mesh=mesh(), in_specs=specs, out_specs=P())
    args = (jnp.float32(0.5), jnp.float32(-1.0), jnp.float32(2.0), x)
    got = jax.grad(shards, (0, 1, 2, 3))(*args)
    expected = jax.grad(total, (0, 1, 2, 3))(*args)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_no_retracing():
    traces = []

    def f(x, step):
        traces.append(1)
        return q.fake_quant(q.lsq(x, step, -8, 7, num_elements=3), -1.0, step).sum()

    g = jax.jit(jax.grad(f, (0, 1)))
    g(f32(1.0, 2.0, 3.0), 0.5)
    count = len(traces)
    g(f32(3.0, 2.0, 1.0), 0.7)
    assert len(traces) == count


# Cost: against a custom_vjp, as users write it today --------------------------------


def by_hand(value, pull):
    @jax.custom_vjp
    def f(*args):
        return value(*args)

    f.defvjp(lambda *args: (value(*args), args), lambda args, ct: pull(ct, *args))
    return f


def _affine(x, s, z):
    code = jnp.round(x * (1 / s)) + z
    return (jnp.clip(code, -8, 7) - z) * s


def _affine_pull(ct, x, s, z):
    code = jnp.round(x * (1 / s)) + z
    return jnp.where((code >= -8) & (code <= 7), ct, 0), None, None


def _lsq(x, s):
    return jnp.round(jnp.clip(x * (1 / s), -8, 7)) * s


def _lsq_pull(ct, x, s):
    v = x * (1 / s)
    inside = (v > -8) & (v < 7)
    code = jnp.round(jnp.clip(v, -8, 7))
    slope = jnp.where(inside, code - v, code)
    return jnp.where(inside, ct, 0), jnp.sum(ct * slope) * (1 / np.sqrt(21))


def _range(low, high):
    s, wide = (high - low) / 255, high - low
    wide, divisor = jnp.where(wide == 0, 1, wide), jnp.where(s == 0, 1, s)
    z = jnp.clip(127.5 - 127.5 * ((low + high) / wide), 0, 255)
    below = jnp.floor(z)
    z = jnp.where(z - below >= 0.5, below + 1, below)
    return z, s, divisor, -z * s, (255 - z) * s


def _fake(x, low, high):
    z, s, divisor, first, last = _range(low, high)
    return (jnp.floor((jnp.clip(x, first, last) - first) * (1 / divisor) + 0.5) - z) * s


def _fake_pull(ct, x, low, high):
    _, _, _, first, last = _range(low, high)
    unset = (low == 0) & (high == 0)
    first, last = jnp.where(unset, -jnp.inf, first), jnp.where(unset, jnp.inf, last)
    below, above = jnp.sum(jnp.where(x < first, ct, 0)), jnp.where(x > last, ct, 0)
    return jnp.where((x >= first) & (x <= last), ct, 0), below, jnp.sum(above)


PAIRS = {
    **{
        value.__name__: (ours, by_hand(value, lambda ct, x: (ct,)), 1)
        for ours, value in list(IDENTITIES.values())[:4]
    },
    "clip": (
        lambda x: q.clip(x, -1.0, 1.0),
        by_hand(lambda x: jnp.clip(x, -1.0, 1.0), lambda ct, x: (ct,)),
        1,
    ),
    "fake_quant": (q.fake_quant, by_hand(_fake, _fake_pull), 3),
    "affine": (
        lambda x, s, z: q.fake_quant_affine(x, s, z, -8, 7),
        by_hand(_affine, _affine_pull),
        3,
    ),
    "lsq": (
        lambda x, s: q.lsq(x, s, -8, 7, num_elements=3),
        by_hand(_lsq, _lsq_pull),
        2,
    ),
}


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize(("ours", "theirs", "count"), PAIRS.values(), ids=PAIRS)
def test_nothing_is_added(ours, theirs, count):
    args = (f32(0.3, -5.0, 0.9), jnp.float32(0.25), jnp.float32(1.0))[:count]
    numbers = tuple(range(2 if ours is not PAIRS["affine"][0] else 1))[:count]
    numbers = (0, 1, 2) if ours is q.fake_quant else numbers
    gradient = lambda f: jax.grad(lambda *args: jnp.sum(f(*args) ** 2), numbers)
    assert instructions(ours, *args) <= instructions(theirs, *args)
    assert instructions(gradient(ours), *args) <= instructions(gradient(theirs), *args)
