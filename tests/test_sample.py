"""Discrete choices: closed forms, contexts, dtypes, cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, f32, instructions, mesh
from sample_cases import (
    CT,
    DRAWS,
    GIVEN,
    LOGITS,
    ONE_HOT,
    D,
    every_draw,
    every_given,
)

import stopgrad_jax as sg

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
    loss = lambda f: lambda xs: jnp.sum(jnp.sin(f(xs)) @ CT)
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
    assert np.sum(np.asarray(naive) < n // 2) - draws / 2 > 5 * np.sqrt(draws / 4)


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zeros_of_either_sign_are_equal(dtype, run):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    if not jnp.array(tiny, dtype) > 0:  # some processors take it for zero
        tiny = float(jnp.finfo(dtype).tiny)

    def marked(*x, k=1):
        row = jnp.array(x, dtype)
        return list(run(lambda x: sg.sample.top_k_mask(x, k))(row))

    assert marked(-0.0, 0.0) == [1, 0]
    assert marked(0.0, -0.0) == [1, 0]
    assert marked(-1.0, -0.0, 0.0, -0.0, k=2) == [0, 1, 1, 0]
    assert marked(-0.0, -0.0, 0.0, 2.0, k=3) == [1, 1, 0, 1]
    assert marked(-0.0, tiny) == [0, 1]
    assert marked(-tiny, -0.0, 0.0) == [0, 1, 0]
    row = jnp.array([-1.0, -0.0, 0.0], dtype)
    first = jnp.where(jnp.arange(3) == 1, 0.0, -jnp.inf).astype(dtype)
    for at in (row, first):  # what the other choices take for the largest
        assert int(jnp.argmax(at)) == 1
    codes = jnp.array([[0.0], [-0.0]], dtype)
    assert list(sg.quantize.vector_quantize(row[1:, None], codes)[1]) == [0, 0]


@pytest.mark.parametrize("draw", list(DRAWS.values())[1:], ids=list(DRAWS)[1:])
def test_a_class_of_probability_0_is_never_drawn(draw):
    logits = f32(0.0, -jnp.inf, 1.0)
    keys = jax.random.split(jax.random.key(0), 500)
    with jax.debug_nans(True):
        samples = jax.vmap(draw, (0, None))(keys, logits)
        f = lambda x: jnp.sum(draw(keys[0], x) * f32(1.0, 2.0, 3.0))
        grad = jax.grad(f)(logits)
    assert np.all(samples[:, 1] == 0)
    assert np.isfinite(grad).all()
    assert grad[1] == 0
    huge = jax.grad(f)(f32(1e30, -1e30, 0.0))
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
    np.testing.assert_allclose(mapped, each, rtol=1e-5, atol=1e-6)
    rows = jnp.broadcast_to(logits, (3, 4))
    ds, ts = jnp.stack([d] * 3), f32(0.5, 1.0, 2.0)[:, None]
    many = lambda x: jnp.sum(w[None] * sg.sample.categorical_given(ds, x, ts))
    np.testing.assert_allclose(jax.grad(many)(rows), each, rtol=1e-5, atol=1e-6)


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
