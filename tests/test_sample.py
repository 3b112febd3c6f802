"""Discrete choices: closed forms, means by enumeration, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, f32, instructions, mesh

import stopgrad_jax as sg

LOGITS = np.float32([0.3, -1.0, 0.8, 0.1])
ONE_HOT = np.eye(4, dtype=np.float32)
NOISE = np.float32(np.random.default_rng(0).gumbel(size=(5, 4)))
CT = np.float32([1.0, -2.0, 0.5, 3.0])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def j(p, g):
    return p * (g - (g * p).sum(-1, keepdims=True))


def conditioned(noise, hot, logits):
    """logits + noise, given the argmax, by exponentials as in the paper."""
    e, z = np.exp(-noise), np.exp(logits).sum()
    chosen = (hot * e).sum(-1, keepdims=True)
    top = -np.log(chosen) + np.log(z)
    return np.where(hot > 0, top, -np.log(e / np.exp(logits) + chosen / z))


S = 1 / (1 + np.exp(-LOGITS))
D = ONE_HOT[2]
HALF = (softmax(LOGITS / 2) + D) / 2
GIVEN = {  # the call, its value, its backward pass
    "bernoulli": (lambda x: sg.sample.bernoulli_given(D, x), D, CT),
    "bernoulli, sigmoid": (
        lambda x: sg.sample.bernoulli_given(D, x, "sigmoid"),
        D,
        CT * S * (1 - S),
    ),
    "categorical": (
        lambda x: sg.sample.categorical_given(D, x),
        D,
        j(softmax(LOGITS), CT),
    ),
    "categorical, temperature": (
        lambda x: sg.sample.categorical_given(D, x, 2.0),
        D,
        j(softmax(LOGITS / 2), CT) / 2,
    ),
    "categorical, backward temperature": (
        lambda x: sg.sample.categorical_given(D, x, 2.0, 0.5),
        D,
        j(softmax(LOGITS * 2), CT) * 2,
    ),
    "gumbel_softmax": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5),
        ONE_HOT[np.argmax(LOGITS + NOISE[0])],
        j(softmax((LOGITS + NOISE[0]) * 2), CT) * 2,
    ),
    "gumbel_softmax, soft": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5, False),
        softmax((LOGITS + NOISE[0]) * 2),
        j(softmax((LOGITS + NOISE[0]) * 2), CT) * 2,
    ),
    "gumbel_softmax, soft, backward temperature": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5, False, 2.0),
        softmax((LOGITS + NOISE[0]) * 2),
        j(softmax((LOGITS + NOISE[0]) / 2), CT) / 2,
    ),
    "reinmax": (
        lambda x: sg.sample.reinmax_given(D, x, 2.0),
        D,
        2 * j(HALF, CT) - j(softmax(LOGITS), CT) / 2,
    ),
    "gumbel_rao": (
        lambda x: sg.sample.gumbel_rao_given(NOISE, D, x, 0.5),
        D,
        (j(softmax(conditioned(NOISE, D, LOGITS) * 2), CT) * 2).mean(0),
    ),
    "top_k_mask": (
        lambda x: sg.sample.top_k_mask(x, 2),
        np.float32([1, 0, 1, 0]),
        CT,
    ),
}
DRAWS = {
    "bernoulli": lambda key, x: sg.sample.bernoulli(key, x, "sigmoid"),
    "categorical": sg.sample.categorical,
    "gumbel_softmax": lambda key, x: sg.sample.gumbel_softmax(key, x, 0.5),
    "reinmax": sg.sample.reinmax,
    "gumbel_rao": lambda key, x: sg.sample.gumbel_rao(key, x, 0.5, 3),
}
every_given = pytest.mark.parametrize("name", GIVEN)
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


# Closed forms -----------------------------------------------------------------------


@every_given
def test_value_and_both_modes(name, run):
    f, value, expected = GIVEN[name]
    out, back = jax.vjp(run(f), jnp.array(LOGITS))
    np.testing.assert_allclose(out, value, rtol=1e-6)
    if "soft" not in name.split(", "):
        np.testing.assert_array_equal(out, value)
    np.testing.assert_allclose(back(jnp.array(CT))[0], expected, rtol=2e-5, atol=1e-6)
    forward, reverse = (d(run(f))(jnp.array(LOGITS)) for d in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-6)


@every_given
def test_second_derivatives_agree_in_all_modes(name):
    f = GIVEN[name][0]
    loss = lambda x: jnp.sum(jnp.sin(f(x)) * CT)
    modes = (jax.jacfwd, jax.jacrev)
    all_of_them = [a(b(loss))(jnp.array(LOGITS)) for a in modes for b in modes]
    for one in all_of_them[1:]:
        np.testing.assert_allclose(one, all_of_them[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one, one.T, atol=1e-5)


def _in_scan(f):
    return lambda x: lax.scan(lambda c, x: (c, f(x)), 0.0, x)[1]


def _in_shards(f):
    return jax.shard_map(
        lambda x: jax.vmap(f)(x), mesh=mesh(), in_specs=P("d"), out_specs=P("d")
    )


EVERYWHERE = {
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "scan": _in_scan,
    "checkpoint": lambda f: jax.vmap(jax.checkpoint(f)),
    "cond": lambda f: jax.vmap(lambda x: lax.cond(x[0] < 9, f, lambda x: x, x)),
    "shard_map": _in_shards,
}
if jax.config.jax_check_tracer_leaks:  # see tests/programs.py
    del EVERYWHERE["shard_map"]


@every_given
@pytest.mark.parametrize("wrap", EVERYWHERE.values(), ids=EVERYWHERE)
def test_everywhere_as_one_by_one(name, wrap):
    f = GIVEN[name][0]
    xs = LOGITS + np.float32([[0], [0.1], [0.2], [0.3]]) * CT
    loss = lambda f: lambda xs: jnp.sum(jnp.sin(f(xs)) * CT)
    outs, grads = wrap(f)(jnp.array(xs)), jax.grad(loss(wrap(f)))(jnp.array(xs))
    for x, out, grad in zip(xs, outs, grads, strict=True):
        np.testing.assert_allclose(out, f(x), rtol=1e-6)
        np.testing.assert_allclose(grad, jax.grad(loss(f))(x), rtol=1e-5, atol=1e-6)


@every_draw
def test_draws_are_mapped_and_replayed(draw, run):
    """A key for each example; in a batch as in any other place."""
    keys = jax.random.split(jax.random.key(0), 6)
    batch = jnp.broadcast_to(jnp.array(LOGITS), (6, 4))
    outs = run(jax.vmap(draw))(keys, batch)
    one_by_one = jnp.stack([draw(k, x) for k, x in zip(keys, batch, strict=True)])
    np.testing.assert_array_equal(outs, one_by_one)
    assert set(np.unique(outs)) <= {0.0, 1.0}
    scanned = _in_scan(lambda kx: draw(*kx))((keys, batch))
    np.testing.assert_array_equal(outs, scanned)


def test_the_class_is_the_one_that_jax_draws():
    logits = jnp.array(np.random.default_rng(1).normal(size=(50, 7)), jnp.float32)
    key = jax.random.key(3)
    expected = jax.random.categorical(key, logits)
    for sample in (
        sg.sample.categorical(key, logits),
        sg.sample.reinmax(key, logits),
        sg.sample.gumbel_softmax(key, logits, 0.1),
    ):
        np.testing.assert_array_equal(jnp.argmax(sample, -1), expected)
    tempered = sg.sample.categorical(key, logits, 3.0)
    expected = jax.random.categorical(key, logits / 3)
    np.testing.assert_array_equal(jnp.argmax(tempered, -1), expected)


# Dtypes, nan, -inf ------------------------------------------------------------------


@every_given
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(name, dtype):
    f, value, expected = GIVEN[name]
    out, back = jax.vjp(f, jnp.array(LOGITS, dtype))
    grad = back(jnp.array(CT, dtype))[0]
    assert out.dtype == grad.dtype == dtype
    if "soft" not in name.split(", "):
        np.testing.assert_array_equal(np.float32(out), value)
    np.testing.assert_allclose(np.float32(grad), expected, atol=0.03)


@every_draw
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_samples_are_exact_in_every_dtype(draw, dtype):
    logits = jnp.zeros((64, 300), dtype)
    sample = draw(jax.random.key(0), logits)
    assert sample.dtype == dtype
    assert set(np.unique(np.float32(sample))) == {0.0, 1.0}
    if draw is not DRAWS["bernoulli"]:
        np.testing.assert_array_equal(np.float32(sample).sum(-1), 1)


def test_16_bit_logits_are_drawn_evenly():
    """Noise of bfloat16 ties, and prefers the first classes: by far more than this."""
    n, draws = 64, 20_000
    logits = jnp.zeros((draws, n), jnp.bfloat16)
    sample = sg.sample.categorical(jax.random.key(0), logits)
    counts = np.float64(sample).reshape(draws, 2, -1).sum((0, 2))
    assert abs(counts[0] - draws / 2) < 5 * np.sqrt(draws / 4)
    naive = jax.random.categorical(jax.random.key(0), logits)
    assert np.sum(naive < n // 2) - draws / 2 > 5 * np.sqrt(draws / 4)


@every_draw
def test_nan_makes_nan_and_only_its_own_row(draw, run):
    logits = jnp.array([LOGITS, LOGITS]).at[1, 2].set(jnp.nan)
    sample = run(draw)(jax.random.key(0), logits)
    assert not np.isnan(sample[0]).any()
    assert np.isnan(sample[1, 2])
    if draw is not DRAWS["bernoulli"]:
        assert np.isnan(sample[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_top_k_mask(dtype):
    mask = lambda *x, k: np.float32(sg.sample.top_k_mask(jnp.array(x, dtype), k))
    np.testing.assert_array_equal(mask(1, 2, 2, 2, 0, k=2), [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(mask(3, -jnp.inf, jnp.inf, k=3), [1, 1, 1])
    np.testing.assert_array_equal(mask(3, -jnp.inf, jnp.inf, k=1), [0, 0, 1])
    assert np.isnan(mask(1, np.nan, 2, k=1)).all()
    assert np.isnan(mask(1, -np.nan, 2, k=1)).all()
    rows = sg.sample.top_k_mask(jnp.arange(24.0).reshape(2, 3, 4), 3)
    np.testing.assert_array_equal(rows, np.broadcast_to([0, 1, 1, 1], (2, 3, 4)))


@pytest.mark.parametrize("draw", list(DRAWS.values())[1:], ids=list(DRAWS)[1:])
def test_a_class_of_probability_0_is_never_drawn(draw):
    logits = jnp.array([0.0, -jnp.inf, 1.0])
    keys = jax.random.split(jax.random.key(0), 500)
    with jax.debug_nans(True):
        samples = jax.vmap(draw, (0, None))(keys, logits)
        f = lambda x: jnp.sum(draw(keys[0], x) * f32(1.0, 2.0, 3.0))
        grad = jax.grad(f)(logits)
    assert np.all(samples[:, 1] == 0)
    assert np.isfinite(grad).all()
    assert grad[1] == 0
    huge = jax.grad(f)(jnp.array([1e30, -1e30, 0.0]))
    assert np.isfinite(huge).all()


def test_samples_of_any_dtype_and_batch():
    index = jnp.array([[0, 3], [1, 2]])
    logits = jnp.zeros((2, 2, 4))
    for dtype in (jnp.int8, jnp.bool_, jnp.float16):
        hot = jax.nn.one_hot(index, 4, dtype=dtype)
        for f in (sg.sample.categorical_given, sg.sample.reinmax_given):
            assert_same_bits(f(hot, logits), jax.nn.one_hot(index, 4))
    assert sg.sample.bernoulli_given(True, 0.5) == 1
    noise = jnp.zeros((3, 2, 2, 4))
    rao = sg.sample.gumbel_rao_given(noise, hot, logits, 1.0)
    assert rao.shape == (2, 2, 4)


def test_temperatures_are_traced_mapped_and_learn():
    d, w = jnp.array(D), jnp.array(CT)
    f = lambda x, t: w @ sg.sample.categorical_given(d, x, t)
    soft = lambda x, t: w @ jax.nn.softmax(x / t)
    logits, t = jnp.array(LOGITS), jnp.float32(2.0)
    np.testing.assert_allclose(
        jax.grad(f, 1)(logits, t), jax.grad(soft, 1)(logits, t), rtol=1e-5
    )
    traces = []

    @jax.jit
    def counted(x, t):
        traces.append(1)
        return jax.grad(f)(x, t)

    each = jnp.stack([counted(logits, jnp.float32(t)) for t in (0.5, 1.0, 2.0)])
    assert len(traces) == 1
    mapped = jax.vmap(jax.grad(f), (None, 0))(logits, f32(0.5, 1.0, 2.0))
    np.testing.assert_allclose(mapped, each, rtol=1e-5)
    rows = jnp.broadcast_to(logits, (3, 4))
    ds, ts = jnp.stack([d] * 3), f32(0.5, 1.0, 2.0)[:, None]
    many = lambda x: jnp.sum(w[None] * sg.sample.categorical_given(ds, x, ts))
    np.testing.assert_allclose(jax.grad(many)(rows), each, rtol=1e-5)


# Means, by enumeration --------------------------------------------------------------


def quadratic(d):
    a = jnp.array(np.random.default_rng(2).normal(size=(4, 4)), jnp.float32)
    return d @ a @ d + jnp.array(CT) @ d


FUNCTIONS = {
    "linear": lambda d: jnp.array(CT) @ d,
    "quadratic": quadratic,
    "cubic": lambda d: (jnp.array(CT) @ d) ** 3,
}


def enumerated(f, given, logits):
    """Return the mean of the estimator, and the gradient of the mean of f."""
    p = jax.nn.softmax(logits)
    hots = jnp.eye(len(logits))
    grads = jax.vmap(lambda d: jax.grad(lambda x: f(given(d, x)))(logits))(hots)
    truth = jax.grad(lambda x: jax.nn.softmax(x) @ jax.vmap(f)(hots))(logits)
    return p @ grads, truth


@pytest.mark.parametrize(
    ("estimator", "function", "is_exact"),
    [
        ("categorical", "linear", True),
        ("categorical", "quadratic", False),
        ("categorical", "cubic", False),
        ("reinmax", "linear", True),
        ("reinmax", "quadratic", True),
        ("reinmax", "cubic", False),
    ],
)
def test_what_is_unbiased(estimator, function, is_exact):
    given = getattr(sg.sample, f"{estimator}_given")
    mean, truth = enumerated(FUNCTIONS[function], given, jnp.array(LOGITS))
    difference = np.abs(mean - truth).max()
    assert (difference < 1e-5) if is_exact else (difference > 0.1)


def test_orders_of_the_bias():
    """For f(scale * d): third order in the scale, against second."""
    w = jnp.array(CT)

    def bias(name, scale):
        given = getattr(sg.sample, f"{name}_given")
        f = lambda d: jnp.exp(scale * (w @ d))
        mean, truth = enumerated(f, given, jnp.array(LOGITS))
        return np.linalg.norm(np.float64(mean - truth))

    for name, order in {"categorical": 2, "reinmax": 3}.items():
        ratio = bias(name, 0.2) / bias(name, 0.1)
        assert abs(np.log2(ratio) - order) < 0.25


def test_bernoulli_is_unbiased_for_linear_functions():
    f, logit = lambda s: 3 * s + 1, jnp.float32(0.7)
    p = jax.nn.sigmoid(logit)
    grad = lambda s: jax.grad(lambda x: f(sg.sample.bernoulli_given(s, x, "sigmoid")))(
        logit
    )
    mean = p * grad(1.0) + (1 - p) * grad(0.0)
    np.testing.assert_allclose(mean, 3 * p * (1 - p), rtol=1e-6)


# Means and variances, by seeded draws -------------------------------------------------

COUNT = 10_000


def drawn_gradients(estimator, logits=LOGITS, count=COUNT):
    f = lambda x, key: FUNCTIONS["cubic"](estimator(key, x))
    keys = jax.random.split(jax.random.key(7), count)
    grads = jax.jit(jax.vmap(jax.grad(f), (None, 0)))(jnp.array(logits), keys)
    return np.float64(grads)


def assert_same_mean(one, other, sigmas=5):
    error = np.sqrt((one.var(0) + other.var(0)) / len(one))
    assert np.all(np.abs(one.mean(0) - other.mean(0)) < sigmas * error)


@every_draw
def test_frequencies(draw):
    keys = jax.random.split(jax.random.key(1), COUNT)
    samples = np.float64(jax.vmap(draw, (0, None))(keys, jnp.array(LOGITS)))
    p = S if draw is DRAWS["bernoulli"] else softmax(LOGITS)
    sigma = np.sqrt(p * (1 - p) / COUNT)
    assert np.all(np.abs(samples.mean(0) - p) < 5 * sigma)


@pytest.mark.parametrize("name", ["categorical", "reinmax"])
def test_drawn_means_are_the_enumerated_ones(name):
    grads = drawn_gradients(getattr(sg.sample, name))
    given = getattr(sg.sample, f"{name}_given")
    mean, _ = enumerated(FUNCTIONS["cubic"], given, jnp.array(LOGITS))
    assert np.all(np.abs(grads.mean(0) - mean) < 5 * grads.std(0) / np.sqrt(COUNT))


def test_gumbel_rao_has_the_mean_of_gumbel_softmax_and_less_variance():
    plain = drawn_gradients(lambda key, x: sg.sample.gumbel_softmax(key, x, 0.5))
    rao = {
        k: drawn_gradients(lambda key, x, k=k: sg.sample.gumbel_rao(key, x, 0.5, k))
        for k in (1, 4, 32)
    }
    for grads in rao.values():
        assert_same_mean(plain, grads)
    variance = {k: grads.var(0).sum() for k, grads in rao.items()}
    assert abs(variance[1] / plain.var(0).sum() - 1) < 0.1  # one sample: the same
    assert variance[32] < variance[4] < variance[1]
    assert variance[32] < 0.8 * variance[1]


def test_the_conditional_noise_is_held_fixed():
    """Through the noise too, the gradient is another one, and some times smaller."""

    def through(key, logits):
        for_sample, for_noise = jax.random.split(key)
        hot = sg.sample.categorical(for_sample, lax.stop_gradient(logits))
        e = jax.random.exponential(for_noise, (8, 4))
        z = jnp.sum(jnp.exp(logits))
        chosen = jnp.sum(hot * e, -1, keepdims=True)
        top = jnp.log(z) - jnp.log(chosen)
        others = -jnp.log(e / jnp.exp(logits)[None] + chosen / z)
        zs = jnp.where(hot[None] > 0, top, others)
        return sg.replace_value(jax.nn.softmax(zs / 0.5).mean(0), hot)

    ours = drawn_gradients(lambda key, x: sg.sample.gumbel_rao(key, x, 0.5, 8))
    theirs = drawn_gradients(through)
    plain = drawn_gradients(lambda key, x: sg.sample.gumbel_softmax(key, x, 0.5))
    assert_same_mean(ours, plain)
    norm = lambda grads: np.linalg.norm(grads.mean(0))
    assert norm(ours) > 2 * norm(theirs)


def test_gumbel_noise_given_its_argmax_is_gumbel_noise():
    """Drawn by way of the class, the noise is standard, and its argmax the class."""
    keys = jax.random.split(jax.random.key(5), COUNT)
    hot = jax.vmap(sg.sample.categorical, (0, None))(keys, jnp.array(LOGITS))
    noise = np.random.default_rng(4).gumbel(size=(COUNT, 4))
    hot = np.asarray(hot)
    z = np.stack([conditioned(g, h, LOGITS) for g, h in zip(noise, hot, strict=True)])
    np.testing.assert_array_equal(z.argmax(-1), np.argmax(hot, -1))
    g = z - LOGITS
    sigma = np.pi / np.sqrt(6 * COUNT)
    assert np.all(np.abs(g.mean(0) - np.euler_gamma) < 5 * sigma)
    kurtosis = 5.4  # of the variance's own spread: (kurtosis - 1) / n
    spread = np.pi**2 / 6 * np.sqrt((kurtosis - 1) / COUNT)
    assert np.all(np.abs(g.var(0) - np.pi**2 / 6) < 5 * spread)


def test_a_low_temperature_trades_bias_for_variance():
    truth = np.array(
        enumerated(FUNCTIONS["cubic"], sg.sample.categorical_given, jnp.array(LOGITS))[
            1
        ]
    )
    variances = []
    for t in (2.0, 0.5, 0.1):
        soft = lambda key, x, t=t: sg.sample.gumbel_softmax(key, x, t, hard=False)
        grads = drawn_gradients(soft)
        variances.append(grads.var(0).sum())
        bias = np.linalg.norm(grads.mean(0) - truth)
        error = np.sqrt(grads.var(0).sum() / COUNT)
        if t == 2.0:
            assert bias > 10 * error
        if t == 0.1:
            assert bias < 5 * error
    assert variances[0] < variances[1] < variances[2]


# Cost -------------------------------------------------------------------------------


def by_hand(value, pull):
    @jax.custom_vjp
    def f(x, d):
        return value(x, d)

    f.defvjp(lambda x, d: (value(x, d), (x, d)), lambda res, ct: (pull(ct, *res), None))
    return f


def _reinmax(x, d):
    """Algorithm 2 of the paper."""
    p = jax.nn.softmax(x)
    middle = (jax.nn.softmax(x) + d) / 2
    one = jax.nn.softmax(lax.stop_gradient(jnp.log(middle) - x) + x)
    two = 2 * one - p / 2
    return two - lax.stop_gradient(two) + d


PAIRS = {
    "bernoulli": (
        lambda x, d: sg.sample.bernoulli_given(d, x),
        by_hand(lambda x, d: d, lambda g, x, d: g),
    ),
    "categorical": (
        lambda x, d: sg.sample.categorical_given(d, x),
        lambda x, d: jax.nn.softmax(x) + lax.stop_gradient(d - jax.nn.softmax(x)),
    ),
    "gumbel_softmax, soft": (
        lambda x, d: sg.sample.gumbel_softmax_given(d, x, 0.5, False),
        lambda x, d: jax.nn.softmax((x + d) / 0.5),
    ),
    "reinmax": (lambda x, d: sg.sample.reinmax_given(d, x), _reinmax),
}


@pytest.mark.parametrize("name", PAIRS)
def test_no_instruction_more_than_by_hand(name):
    x, d = jnp.array([LOGITS] * 3), jnp.array(ONE_HOT[:3])
    counts = []
    for f in PAIRS[name]:
        loss = lambda x, d, f=f: jnp.sum(jnp.sin(f(x, d)) * x)
        both = jax.value_and_grad(loss)
        counts.append((instructions(loss, x, d), instructions(both, x, d)))
    assert counts[0][0] <= counts[1][0]
    assert counts[0][1] <= counts[1][1]


# What is refused --------------------------------------------------------------------

KEY = jax.random.key(0)
X = jnp.array(LOGITS)
REFUSED = {
    "ints": (
        TypeError,
        r"categorical\(key, logits\): floating logits",
        lambda: sg.sample.categorical(KEY, jnp.arange(3)),
    ),
    "ints, reinmax": (
        TypeError,
        "floating logits",
        lambda: sg.sample.reinmax(KEY, jnp.arange(3)),
    ),
    "ints, bernoulli": (
        TypeError,
        "floating logits",
        lambda: sg.sample.bernoulli(KEY, 3),
    ),
    "ints, scores": (
        TypeError,
        "floating scores",
        lambda: sg.sample.top_k_mask(jnp.arange(3), 1),
    ),
    "no axis": (
        ValueError,
        "logits with a last axis",
        lambda: sg.sample.gumbel_softmax(KEY, 0.5, 1.0),
    ),
    "no class": (
        ValueError,
        "logits with a last axis",
        lambda: sg.sample.gumbel_rao(KEY, jnp.zeros((2, 0)), 1.0, 2),
    ),
    "temperature 0": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.gumbel_softmax(KEY, X, 0.0),
    ),
    "a negative one": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.reinmax(KEY, X, jnp.float32(-1)),
    ),
    "nan": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.gumbel_rao(KEY, X, jnp.nan, 2),
    ),
    "backward": (
        ValueError,
        "backward_temperature is above 0",
        lambda: sg.sample.categorical(KEY, X, 1.0, 0.0),
    ),
    "bad, though not used": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.categorical_given(D, X, 0.0, 1.0),
    ),
    "temperature's shape": (
        ValueError,
        "temperature broadcasts to logits",
        lambda: sg.sample.categorical(KEY, X, jnp.ones(3)),
    ),
    "temperature's rank": (
        ValueError,
        "temperature broadcasts to logits",
        lambda: sg.sample.categorical(KEY, X, jnp.ones((2, 4))),
    ),
    "temperature's dtype": (
        TypeError,
        "temperature is a real number",
        lambda: sg.sample.categorical(KEY, X, 1j),
    ),
    "adjust": (
        ValueError,
        'adjust is "identity" or "sigmoid"',
        lambda: sg.sample.bernoulli(KEY, X, "tanh"),
    ),
    "indices": (
        ValueError,
        r"sample of shape \(2, 4\)[\s\S]*write: jax.nn.one_hot\(sample, 4\)",
        lambda: sg.sample.reinmax_given(jnp.array([0, 1]), jnp.zeros((2, 4))),
    ),
    "sample": (
        ValueError,
        r"sample of shape \(4,\)",
        lambda: sg.sample.bernoulli_given(1.0, X),
    ),
    "noise": (
        ValueError,
        r"noise of shape \(4,\)",
        lambda: sg.sample.gumbel_softmax_given(NOISE, X, 1.0),
    ),
    "noise of one": (
        ValueError,
        "noise with a leading axis",
        lambda: sg.sample.gumbel_rao_given(NOISE[0], D, X, 1.0),
    ),
    "noise of none": (
        ValueError,
        "noise with a leading axis",
        lambda: sg.sample.gumbel_rao_given(NOISE[:0], D, X, 1.0),
    ),
    "noise of others": (
        ValueError,
        r"noise of shape \(5, 4\)",
        lambda: sg.sample.gumbel_rao_given(NOISE[:, :3], D, X, 1.0),
    ),
    "num_samples 0": (
        ValueError,
        "num_samples is at least 1",
        lambda: sg.sample.gumbel_rao(KEY, X, 1.0, 0),
    ),
    "num_samples a float": (
        TypeError,
        "num_samples is an int",
        lambda: sg.sample.gumbel_rao(KEY, X, 1.0, 2.0),
    ),
    "k 0": (ValueError, "k is at least 1", lambda: sg.sample.top_k_mask(X, 0)),
    "k 5": (ValueError, "k is at most 4", lambda: sg.sample.top_k_mask(X, 5)),
    "k traced": (
        TypeError,
        "k is an int",
        lambda: jax.jit(lambda k: sg.sample.top_k_mask(X, k))(2),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    kind, words, call = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["got", "write"]
