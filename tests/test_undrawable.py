"""Logits of -inf, inf and nan, rows with nothing to draw, temperatures near 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import assert_same_bits, f32
from sample_cases import DRAWS

import stopgrad_jax as sg

INF, NAN = jnp.inf, jnp.nan
KEYS = jax.random.split(jax.random.key(0), 200)
CHOICES = {name: draw for name, draw in DRAWS.items() if name != "bernoulli"}
every_choice = pytest.mark.parametrize("draw", CHOICES.values(), ids=CHOICES)
SOFT = {
    "soft": lambda key, x: sg.sample.gumbel_softmax(key, x, 0.5, hard=False),
    "tempered": lambda key, x: sg.sample.categorical(key, x, 2.0, 0.5),
}


def gradient(draw, logits, weights=None):
    weights = jnp.cos(jnp.arange(logits.shape[-1])) if weights is None else weights
    f = lambda x: jnp.sum(draw(KEYS[0], x) * weights)
    return jax.grad(f)(logits)


NOTHING = {
    "all -inf": f32(-INF, -INF, -INF),
    "two inf": f32(INF, 0.0, INF),
    "one inf": f32(0.0, INF, 1.0),
    "inf and -inf": f32(-INF, INF, -INF),
    "nan": f32(0.0, NAN, 1.0),
    "nan and -inf": f32(-INF, NAN, -INF),
    "one class, -inf": f32(-INF),
    "one class, inf": f32(INF),
}


@pytest.mark.parametrize("logits", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_softmax_is_nan_so_is_the_sample(logits, dtype):
    """Not class 0, as of `jax.random.categorical`."""
    logits = logits.astype(dtype)
    assert jnp.isnan(jax.nn.softmax(logits)).all()
    assert 0 <= jax.random.categorical(KEYS[0], logits) < len(logits)
    for draw in (*CHOICES.values(), *SOFT.values()):
        sample = draw(KEYS[0], logits)
        assert sample.dtype == dtype
        assert jnp.isnan(sample).all()
        assert jnp.isnan(gradient(draw, logits)).any()


@every_choice
def test_only_its_own_row(draw, run):
    batch = f32([0.0, -INF, 1.0], [-INF] * 3, [1.0, 2.0, 3.0], [0.0, INF, 0.0])
    samples = run(draw)(KEYS[1], batch)
    np.testing.assert_array_equal(
        jnp.isnan(samples).all(-1), [False, True, False, True]
    )
    np.testing.assert_array_equal(samples[::2].sum(-1), 1)
    weights = f32([1.0, 2.0, 3.0], [0.0] * 3, [1.0, -2.0, 1.0], [0.0] * 3)
    back = gradient(draw, batch, weights)
    assert np.isfinite(back[::2]).all()
    # A row without choices: finite logits, and its sample masked.
    some = jnp.isfinite(batch).any(-1, keepdims=True) & (batch != INF).all(
        -1, keepdims=True
    )
    masked = lambda key, x: jnp.where(some, draw(key, jnp.where(some, x, 0.0)), 0.0)
    assert np.isfinite(gradient(masked, batch, weights)).all()
    np.testing.assert_array_equal(masked(KEYS[1], batch)[1], 0)


@every_choice
def test_one_class_that_can_be_drawn(draw):
    """Of one finite logit it is that one; there is nothing to learn."""
    for logits, expected in (
        (f32(-INF, 3.0, -INF), [0, 1, 0]),
        (f32(-INF, -1e38, -INF), [0, 1, 0]),
        (f32(5.0), [1]),
    ):
        samples = jax.vmap(draw, (0, None))(KEYS[:20], logits)
        np.testing.assert_array_equal(samples, np.broadcast_to(expected, samples.shape))
        np.testing.assert_allclose(gradient(draw, logits), 0, atol=1e-7)


@every_choice
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_class_of_minus_infinity_is_as_if_it_were_not(draw, dtype):
    """Drawn as rarely as the others allow; their gradients as of those alone."""
    logits = f32(0.5, -INF, -1.0, -INF, 0.2).astype(dtype)
    samples = jax.vmap(draw, (0, None))(KEYS, logits)
    np.testing.assert_array_equal(np.float32(samples).sum(-1), 1)
    np.testing.assert_array_equal(samples[:, 1::2], 0)
    back = gradient(draw, logits)
    np.testing.assert_array_equal(back[1::2], 0)
    assert np.isfinite(np.float32(back)).all()


def test_what_a_given_draw_leaves_of_minus_infinity():
    """Closed forms: those of the classes that are left."""
    sample, logits, ct = f32(1, 0, 0), f32(0.5, -INF, -1.0), f32(1.0, 5.0, -2.0)
    left = lambda v: v[::2]
    noise = f32([0.3, 0.1, -0.2], [1.0, 2.0, 0.5])
    for f in (
        lambda d, x, g: sg.sample.categorical_given(d, x, 2.0),
        lambda d, x, g: sg.sample.reinmax_given(d, x),
        lambda d, x, g: sg.sample.gumbel_softmax_given(g[0], x, 0.5),
        lambda d, x, g: sg.sample.gumbel_rao_given(g, d, x, 0.5),
    ):
        pull = lambda d, x, g, ct, f=f: jax.vjp(lambda x: f(d, x, g), x)[1](ct)[0]
        got = pull(sample, logits, noise, ct)
        expected = pull(left(sample), left(logits), noise[:, ::2], left(ct))
        np.testing.assert_allclose(left(got), expected, rtol=1e-5)
        assert got[1] == 0


def test_bernoulli_of_infinite_logits():
    logits = f32(INF, -INF, 0.0)
    for adjust, at_zero in (("identity", 1.0), ("sigmoid", 0.25)):
        draw = lambda key, x, adjust=adjust: sg.sample.bernoulli(key, x, adjust)
        samples = jax.vmap(draw, (0, None))(KEYS, logits)
        np.testing.assert_array_equal(samples[:, 0], 1)
        np.testing.assert_array_equal(samples[:, 1], 0)
        back = gradient(draw, logits, jnp.ones(3))
        ends = 1 if adjust == "identity" else 0
        np.testing.assert_allclose(back, [ends, ends, at_zero])


def test_top_k_of_fewer_finite_scores():
    """A score of -inf is one like any other; the gradient passes at each."""
    scores = f32(-INF, 2.0, -INF, -INF)
    mask = lambda k: sg.sample.top_k_mask(scores, k)
    np.testing.assert_array_equal(mask(1), [0, 1, 0, 0])
    np.testing.assert_array_equal(mask(3), [1, 1, 1, 0])
    np.testing.assert_array_equal(
        sg.sample.top_k_mask(f32(INF, INF, 0.0), 1), [1, 0, 0]
    )
    back = jax.grad(lambda s: jnp.sum(sg.sample.top_k_mask(s, 3)))(scores)
    np.testing.assert_array_equal(back, 1)


# Temperatures -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, 1e-42])
@pytest.mark.parametrize("logits", [f32(1.0, 2.0), f32(-1.0, -2.0), f32(0.0, -INF)])
def test_a_traced_temperature_that_is_none(logits, temperature):
    """What it divides is nan: a class by its sign, or class 0, would be silent."""
    f = jax.jit(lambda t: sg.sample.categorical(KEYS[0], logits, t))
    value = f(jnp.float32(temperature))
    if temperature != 1e-42 or not jnp.array_equal(value, f(jnp.float32(1e-30))):
        assert jnp.isnan(value).all()
    hard = jax.jit(lambda t: sg.sample.gumbel_softmax(KEYS[0], logits, t))
    np.testing.assert_array_equal(hard(temperature), hard(1.0))  # not divided


def test_a_known_temperature_is_refused_under_jit_too():
    f = jax.jit(lambda x: sg.sample.categorical(KEYS[0], x, 0.0))
    with pytest.raises(ValueError, match="temperature is above 0"):
        f(f32(1.0, 2.0))


def test_a_low_temperature_draws_the_largest():
    logits, keys = f32(0.1, 0.3, -INF, 0.2), KEYS[:50]
    for t in (1e-3, 1e-6, 1e-30):
        f = jax.jit(
            jax.vmap(lambda k, t: sg.sample.categorical(k, logits, t), (0, None))
        )
        np.testing.assert_array_equal(jnp.argmax(f(keys, t), -1), 1)
        back = gradient(lambda k, x, t=t: sg.sample.categorical(k, x, t), logits)
        assert np.isfinite(back).all()


def test_a_temperature_learns_beside_a_class_of_minus_infinity():
    """Its derivative is that of the classes that are left, not nan."""
    w = f32(1.0, 7.0, 3.0)
    logits, left = f32(0.5, -INF, -1.0), f32(0.5, -1.0)
    sample, noise = f32(1, 0, 0), f32([0.3, 0.1, -0.2], [1.0, 2.0, 0.5])
    forms = (
        lambda d, x, g, t: sg.sample.categorical_given(d, x, t),
        lambda d, x, g, t: sg.sample.categorical_given(d, x, 1.0, t),
        lambda d, x, g, t: sg.sample.gumbel_softmax_given(g[0], x, t),
        lambda d, x, g, t: sg.sample.gumbel_softmax_given(g[0], x, t, hard=False),
        lambda d, x, g, t: sg.sample.gumbel_rao_given(g, d, x, t),
    )
    for f in forms:
        whole = jax.grad(lambda t, f=f: w @ f(sample, logits, noise, t))(2.0)
        part = jax.grad(lambda t, f=f: w[::2] @ f(sample[::2], left, noise[:, ::2], t))(
            2.0
        )
        np.testing.assert_allclose(whole, part, rtol=1e-5)
        assert part != 0


def test_a_traced_temperature_draws_as_a_known_one():
    """Bit for bit, also where a logit is -inf."""
    logits = f32([0.5, -INF, -1.0], [1.0, 2.0, 3.0])
    f = lambda t: sg.sample.categorical(KEYS[0], logits, t)
    assert_same_bits(jax.jit(f)(0.7), jax.jit(lambda: f(0.7))())
