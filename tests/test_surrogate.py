"""Steps and signs: exact forward, the derivative that was asked for backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, instructions, mesh

import stopgrad_jax as sg

S = sg.surrogate
BEATS = r"[\s\S]*got: [\s\S]*write: "
TWO_VALUED = {"spike": (S.spike, 0), "sign": (S.sign, -1)}
MADE = {
    "fast_sigmoid": S.fast_sigmoid(),
    "sigmoid": S.sigmoid(),
    "sigmoid, peak": S.sigmoid(4.0, peak=0.5),
    "atan": S.atan(),
    "triangle": S.triangle(0.5, 0.3),
    "boxcar": S.boxcar(),
    "gaussian": S.gaussian(),
    "gaussian, peak": S.gaussian(0.5, peak=1.0),
    "multi_gaussian": S.multi_gaussian(),
    "exponential": S.exponential(0.5, 2.0),
    "leaky": S.leaky(),
    "identity": S.identity(),
    "hard_tanh": S.hard_tanh(),
    "hard_tanh, open": S.hard_tanh(closed=False),
    "approx_sign": S.approx_sign(),
    "swish_sign": S.swish_sign(),
}
made = pytest.mark.parametrize("derivative", MADE.values(), ids=MADE)
two_valued = pytest.mark.parametrize(
    ("step", "low"), TWO_VALUED.values(), ids=TWO_VALUED
)


def slope_at(derivative, x):
    """Take the derivative through a spike."""
    x = jnp.asarray(x, jnp.float32)
    return np.asarray(jax.grad(lambda x: jnp.sum(S.spike(x, derivative)))(x))


# Forward -----------------------------------------------------------------------------


@pytest.mark.parametrize("at_zero", [1.0, 0.0, -1, 0.5, np.float32(0.25)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@two_valued
def test_two_values_and_at_zero(step, low, dtype, at_zero, run):
    x = every_value(dtype)
    out = run(lambda x: step(x, S.sigmoid(), at_zero=at_zero))(x)
    assert out.dtype == x.dtype
    signs = run(jnp.sign)(x)  # 0 at subnormals where the device says so
    at_zero = np.float32(np.asarray(at_zero).astype(out.dtype))
    # By JAX: NumPy may warn of the signaling nans among them.
    out, x, signs = (np.asarray(a.astype(jnp.float32)) for a in (out, x, signs))
    assert np.all(out[signs == 1] == 1)
    assert np.all(out[signs == -1] == low)
    assert np.all(out[signs == 0] == at_zero)
    assert np.all(np.isnan(out[np.isnan(x)]))
    assert set(signs[~np.isnan(signs)]) == {-1, 0, 1}


def test_edges():
    x = f32(-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf)
    np.testing.assert_array_equal(S.spike(x, S.atan()), [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(S.sign(x, S.atan()), [-1, -1, 1, 1, 1, 1])
    np.testing.assert_array_equal(S.sign(x, S.atan(), at_zero=0.0), np.sign(x))
    assert S.spike(0.5, S.atan()) == 1
    assert jax.jit(lambda z: S.spike(x, S.atan(), at_zero=z))(0.25)[2] == 0.25


# Backward ----------------------------------------------------------------------------


def _normal(x, mean, std):
    return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))


def _spyx_atan(x):
    return 2 * np.pi * (1 / (np.pi * (1 + (2 * np.pi * x) ** 2)))


# (ours, the formula as the library or the paper writes it)
PRESETS = {
    "snntorch fast_sigmoid": (S.fast_sigmoid(), lambda x: 1 / (25 * abs(x) + 1) ** 2),
    "norse super": (S.fast_sigmoid(1.0), lambda x: 1 / (abs(x) + 1) ** 2),
    "snntorch sigmoid": (
        S.sigmoid(25.0),
        lambda x: 25 * np.exp(-25 * x) / (np.exp(-25 * x) + 1) ** 2,
    ),
    "spikingjelly sigmoid": (
        S.sigmoid(4.0),
        lambda x: 4 * np.exp(-4 * x) / (np.exp(-4 * x) + 1) ** 2,
    ),
    "snntorch atan": (S.atan(), lambda x: 1 / (1 + (np.pi / 2 * 2 * x) ** 2)),
    "spyx arctan, times 2 pi": (S.atan(4.0), _spyx_atan),
    "norse triangle": (
        S.triangle(peak=0.3),
        lambda x: 0.3 * np.maximum(1 - abs(x), 0),
    ),
    "spyx triangular": (S.triangle(0.5), lambda x: np.maximum(0, 1 - abs(2 * x))),
    "spyx boxcar": (S.boxcar(), lambda x: 0.5 * (abs(x) < 1)),
    "normal density": (S.gaussian(0.5), lambda x: _normal(x, 0, 0.5)),
    "spikingjelly erf": (
        S.gaussian(1 / (np.sqrt(2.0).item() * 2)),
        lambda x: 2 / np.sqrt(np.pi) * np.exp(-((2 * x) ** 2)),
    ),
    "norse erfc": (
        S.gaussian(1 / np.sqrt(2.0).item(), peak=2 / np.sqrt(np.pi).item()),
        lambda x: 2 * np.exp(-(x**2)) / np.sqrt(np.pi),
    ),
    "Yin 2021": (
        S.multi_gaussian(),
        lambda x: (
            0.5
            * (
                1.15 * _normal(x, 0, 0.5)
                - 0.15 * _normal(x, 0.5, 3)
                - 0.15 * _normal(x, -0.5, 3)
            )
        ),
    ),
    "lava-dl": (S.exponential(2.0, 3.0), lambda x: 3 / 2 / 2 * np.exp(-abs(x) / 2)),
    "spikingjelly exp": (S.exponential(), lambda x: 0.5 * np.exp(-abs(x))),
    "leaky": (S.leaky(), lambda x: np.where(x >= 0, 1, 0.1)),
    "identity": (S.identity(), np.ones_like),
    "larq ste_sign": (S.hard_tanh(), lambda x: (abs(x) <= 1) * 1.0),
    "open": (S.hard_tanh(closed=False), lambda x: (abs(x) < 1) * 1.0),
    "larq approx_sign": (
        S.approx_sign(),
        lambda x: np.where(abs(x) <= 1, (1 - abs(x)) * 2, 0),
    ),
    "larq swish_sign": (
        S.swish_sign(),
        lambda x: 5 * (2 - 5 * x * np.tanh(5 * x / 2)) / (1 + np.cosh(5 * x)),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_derivative_is_the_published_one(name):
    ours, theirs = PRESETS[name]
    x = np.concatenate([np.linspace(-3, 3, 241), [-1.0, 1.0, 0.5, -0.5, 0.0, -0.0]])
    x = np.float32(x)
    expected = theirs(np.float64(x))
    np.testing.assert_allclose(slope_at(ours, x), expected, rtol=3e-5, atol=1e-7)


@two_valued
@made
def test_both_modes_multiply_by_it(derivative, step, low, run):
    x, ct = f32(-1.0, -0.3, 0.0, 0.4, 1.0), f32(1.0, -2.0, 3.0, 0.5, 2.0)
    f = run(lambda x: step(x, derivative))
    value, tangent = jax.jvp(f, (x,), (ct,))
    np.testing.assert_allclose(tangent, ct * derivative(x), rtol=1e-6)
    np.testing.assert_array_equal(value, f(x))
    np.testing.assert_allclose(jax.vjp(f, x)[1](ct)[0], tangent, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@made
def test_finite_everywhere_and_nan_at_nan(derivative, dtype):
    x = every_value(dtype)
    slopes = jax.jit(jax.grad(lambda x: jnp.sum(S.spike(x, derivative))))(x)
    assert slopes.dtype == x.dtype
    x, slopes = (np.asarray(a.astype(jnp.float32)) for a in (x, slopes))
    assert np.all(np.isfinite(slopes[~np.isnan(x)]))
    if derivative is MADE["identity"]:
        assert np.all(slopes == 1)
        return
    assert np.all(np.isnan(slopes[np.isnan(x)]))
    ends = {1.0, np.asarray(0.1, dtype).astype(np.float32).item()}
    if derivative is not MADE["leaky"]:
        ends = {0.0}
    assert set(slopes[np.isinf(x)].tolist()) == ends


def test_narrow_floats_are_right_to_the_last_bit_or_two():
    """They are computed in float32: rounded once, at the end."""
    x = jnp.linspace(-2, 2, 401).astype(jnp.bfloat16)
    for derivative in MADE.values():
        exact = np.asarray(derivative(x.astype(jnp.float32)))
        ours = np.asarray(derivative(x)).astype(np.float32)
        np.testing.assert_allclose(ours, exact, rtol=2**-8)


AREAS = {
    "sigmoid": (S.sigmoid(2.0), 1),
    "atan": (S.atan(2.0), 1),
    "triangle": (S.triangle(2.0, 0.25), 0.5),
    "boxcar": (S.boxcar(4.0, 0.25), 1),
    "fast_sigmoid": (S.fast_sigmoid(4.0), 0.5),
    "gaussian": (S.gaussian(0.5), 1),
    "multi_gaussian": (S.multi_gaussian(), 0.425),
    "exponential": (S.exponential(0.5, 3.0), 3),
    "hard_tanh": (S.hard_tanh(), 2),
    "approx_sign": (S.approx_sign(), 2),
    "swish_sign": (S.swish_sign(), 2),
}


@pytest.mark.parametrize("name", AREAS)
def test_areas(name):
    derivative, area = AREAS[name]
    # On a grid that is finer in the middle: x = t / (1 - t**2).
    t = np.linspace(-1, 1, 200_003)[1:-1]
    x, weight = t / (1 - t**2), (1 + t**2) / (1 - t**2) ** 2
    slopes = np.asarray(derivative(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(np.sum(slopes * weight) * (t[1] - t[0]), area, rtol=1e-3)


def test_a_density_is_the_derivative_of_a_noisy_step():
    """E spike(x + n) has the derivative E' = the density of n at x, within 5 sigma."""
    noise = jax.random.logistic(jax.random.key(0), (400_000,), jnp.float32) / 2
    draws = jnp.float32(0.3) + noise
    mean = float(jnp.mean(S.spike(draws, S.sigmoid())))
    expected = 1 / (1 + np.exp(-2 * 0.3))
    sigma = np.sqrt(expected * (1 - expected) / draws.size)
    assert abs(mean - expected) < 5 * sigma
    slope = slope_at(S.sigmoid(2.0), 0.3)
    np.testing.assert_allclose(slope, 2 * expected * (1 - expected), rtol=1e-5)


# Higher orders, parameters -----------------------------------------------------------


def by_hand(derivative, low=0):
    """Write a step as a custom_jvp, as users do today."""

    @jax.custom_jvp
    def step(x):
        return jnp.where(x >= 0, 1, jnp.where(x < 0, low, x))

    @step.defjvp
    def _(primals, tangents):
        return step(*primals), derivative(*primals) * tangents[0]

    return step


@pytest.mark.parametrize("name", ["atan", "sigmoid", "gaussian", "fast_sigmoid"])
def test_every_order_is_that_of_a_custom_jvp(name):
    derivative, x = MADE[name], jnp.float32(0.11)
    ours = lambda x: jnp.sin(S.spike(x, derivative) + x)
    theirs = lambda x: jnp.sin(by_hand(derivative)(x) + x)
    r, f = jax.grad, jax.jacfwd
    for ways in ([r], [f], [r, r], [r, f], [f, r], [f, f], [r, r, r], [r, f, f]):
        one, other = ours, theirs
        for way in ways:
            one, other = way(one), way(other)
        np.testing.assert_allclose(jax.jit(one)(x), jax.jit(other)(x), rtol=1e-4)
    stopped = lambda x: S.spike(x, lambda x: derivative(jax.lax.stop_gradient(x)))
    np.testing.assert_allclose(jax.grad(stopped)(x), derivative(x), rtol=1e-6)
    assert jax.grad(jax.grad(stopped))(x) == 0


@made
def test_second_derivatives_are_finite(derivative):
    x = f32(-1e18, -1e6, -88.0, -4.0, -1.0, 0.0, 1.0, 4.0, 88.0, 1e6, 1e18)
    second = jax.vmap(jax.grad(jax.grad(lambda x: S.spike(x, derivative))))(x)
    assert np.all(np.isfinite(second))


def test_a_slope_may_be_traced_mapped_and_has_no_gradient():
    x = f32(-0.5, 0.25)
    f = lambda x, slope: jnp.sum(S.spike(x, S.fast_sigmoid(slope)))
    slopes = f32(1.0, 4.0, 25.0)
    mapped = jax.jit(jax.vmap(jax.grad(f), (None, 0)))(x, slopes)
    expected = [slope_at(S.fast_sigmoid(s), x) for s in (1.0, 4.0, 25.0)]
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    assert jax.grad(f, 1)(x, 4.0) == 0
    each = slope_at(S.fast_sigmoid(f32(1.0, 4.0)), x)
    np.testing.assert_allclose(each, [expected[0][0], expected[1][1]], rtol=1e-6)


def test_a_derivative_may_be_a_mask_or_whole_numbers():
    x = f32(-2.0, 0.5)
    np.testing.assert_array_equal(slope_at(lambda x: jnp.abs(x) < 1, x), [0, 1])
    np.testing.assert_array_equal(
        slope_at(lambda x: jnp.ones(x.shape, "int32"), x), [1, 1]
    )
    assert slope_at(lambda x: 0.5, 1.0) == 0.5


# Transforms, cost --------------------------------------------------------------------


def _sharded(f, x):
    f = jax.shard_map(f, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
    return jax.jit(f)(x)


def _scanned(f, x):
    return jax.lax.scan(lambda c, x: (c, f(x)), 0.0, x)[1]


WAYS = {
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "vmap, twice": lambda f, x: jax.vmap(jax.vmap(f))(x.reshape(4, 2)).ravel(),
    "scan": _scanned,
    "map": lambda f, x: jax.lax.map(f, x),
    "remat": lambda f, x: jax.checkpoint(f)(x),
    "cond": lambda f, x: jax.lax.cond(x[0] < 9, f, lambda x: x, x),
    "shard_map": _sharded,
}
if jax.config.jax_check_tracer_leaks:
    del WAYS["shard_map"]  # as in programs.EVERYWHERE


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@two_valued
def test_the_same_under_every_transform(step, low, way):
    x, ct = f32(*np.linspace(-1, 1, 8)), f32(*range(8))
    f = lambda x: step(x, S.triangle())
    for g in (f, jax.checkpoint(f)):
        wrapped = lambda x, g=g: way(g, x)
        assert_same_bits(wrapped(x), f(x))
        np.testing.assert_array_equal(
            jax.vjp(wrapped, x)[1](ct)[0], ct * S.triangle()(x)
        )
        np.testing.assert_array_equal(
            jax.jvp(wrapped, (x,), (ct,))[1], ct * S.triangle()(x)
        )


def _neurons(step):
    def tick(potential, x):
        potential = 0.9 * potential + x
        spikes = step(potential - 1)
        return potential - spikes, spikes

    return tick


LOOPS = {
    "plain": lambda f: f,
    "vmap": lambda f: lambda x: jax.vmap(f)(x.reshape(2, 4)),
    "scan": lambda f: (
        lambda x: jax.lax.scan(
            lambda v, _: _neurons(f)(v, x), jnp.zeros_like(x), None, length=5
        )
    ),
    "scan of remat": lambda f: (
        lambda x: jax.lax.scan(
            jax.checkpoint(lambda v, _: _neurons(f)(v, x)),
            jnp.zeros_like(x),
            None,
            length=5,
        )
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("name", ["fast_sigmoid", "sigmoid", "boxcar", "swish_sign"])
def test_no_instruction_more_than_by_hand(name, loop):
    x, derivative = f32(*range(-4, 4)), MADE[name]

    def counts(step):
        out = loop(step)
        loss = lambda x: sum(jnp.sum(y * y) for y in jax.tree.leaves(out(x)))
        tangent = lambda x: jax.jvp(loss, (x,), (x,))[1]
        functions = (loss, jax.value_and_grad(loss), tangent)
        return [instructions(f, x) for f in functions]

    for step, low in TWO_VALUED.values():
        ours = counts(lambda x, step=step: step(x, derivative))
        theirs = counts(by_hand(derivative, low))
        assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_no_derivative_is_traced_again():
    traces = []

    def derivative(x):
        traces.append(1)
        return jnp.ones_like(x)

    f = jax.jit(jax.grad(lambda x: S.spike(x, derivative)))
    f(1.0)
    f(2.0)
    assert len(traces) == 1


# What is refused ---------------------------------------------------------------------


def test_what_is_no_step():
    x = f32(1.0, 2.0)
    refused = {
        "x is an array of real floats": (
            TypeError,
            [
                lambda: S.spike(jnp.arange(3), S.atan()),
                lambda: S.sign(3, S.atan()),
                lambda: S.sign(jnp.ones(2, "complex64"), S.atan()),
                lambda: S.spike({"a": x}, S.atan()),
            ],
        ),
        r"derivative\(x\) has the shape of x, f32\[2\]": (
            ValueError,
            [lambda: S.spike(x, jnp.sum), lambda: S.spike(x, lambda x: 1.0)],
        ),
        r"derivative\(x\) has the dtype of x, f32\[2\]": (
            TypeError,
            [
                lambda: S.spike(x, lambda x: x.astype("bfloat16")),
                lambda: S.sign(x, lambda x: x.astype("complex64")),
            ],
        ),
        "derivative is a function of x with a result like x": (
            TypeError,
            [lambda: S.spike(x, S.atan), lambda: S.spike(x, 0.5)],
        ),
    }
    for words, (kind, calls) in refused.items():
        for call in calls:
            with pytest.raises(kind, match=words + BEATS):
                call()


NOT_POSITIVE = {
    "fast_sigmoid": "slope",
    "sigmoid": "slope",
    "atan": "alpha",
    "triangle": "width",
    "boxcar": "width",
    "gaussian": "std",
    "multi_gaussian": "std",
    "exponential": "width",
    "swish_sign": "beta",
}


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.array([1.0, 0.0])], ids=str)
@pytest.mark.parametrize("name", NOT_POSITIVE)
def test_parameters_that_are_not_positive(name, value):
    parameter = NOT_POSITIVE[name]
    words = rf"{name}\({parameter}\): {parameter} is positive" + BEATS
    with pytest.raises(ValueError, match=words):
        getattr(S, name)(value)


def test_every_public_name_is_documented():
    for name in S.__all__:
        doc = getattr(S, name).__doc__
        for part in ("Forward:", "Backward:", "Returns:", "Example:", "Reference:"):
            assert part in doc, (name, part)
