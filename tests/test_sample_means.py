"""Discrete choices: means by enumeration, and statistics of seeded draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sample_cases import (
    CT,
    DRAWS,
    LOGITS,
    S,
    conditioned,
    every_draw,
    softmax,
)

import stopgrad_jax as sg

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
    hots = jnp.eye(len(logits), dtype=jnp.float32)
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
    assert np.all(
        np.abs(grads.mean(0) - np.asarray(mean)) < 5 * grads.std(0) / np.sqrt(COUNT)
    )


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
        e = jax.random.exponential(for_noise, (8, 4), jnp.float32)
        z = jnp.sum(jnp.exp(logits))
        chosen = jnp.sum(hot[None] * e, -1, keepdims=True)
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
