"""What the page of `sample` says of bias, variance and price, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, primitives
from sample_cases import CT, LOGITS, ONE_HOT
from test_sample_means import FUNCTIONS, enumerated

import stopgrad_jax as sg

X = jnp.array(LOGITS)


def over_classes(f, given):
    """Return the gradient for each class drawn, and the probabilities."""
    grads = jax.vmap(lambda d: jax.grad(lambda x: f(given(d, x)))(X))(
        jnp.array(ONE_HOT)
    )
    return np.float64(grads), np.float64(jax.nn.softmax(X))


def variance(grads, p):
    return (p @ (grads - p @ grads) ** 2).sum()


def by_score(f):
    """The same of a likelihood ratio, whose function is not differentiated."""

    def gradient(d):
        cost = jax.lax.stop_gradient(f(d))
        return jax.grad(lambda x: sg.score.score_loss(cost, d @ jax.nn.log_softmax(x)))(
            X
        )

    return np.float64(jax.vmap(gradient)(jnp.array(ONE_HOT)))


def test_variance_for_linear_functions():
    """None straight through; some of ReinMax."""
    linear = FUNCTIONS["linear"]
    assert variance(*over_classes(linear, sg.sample.categorical_given)) < 1e-12
    assert variance(*over_classes(linear, sg.sample.reinmax_given)) > 0.1


def test_which_has_less_variance_depends_on_the_function():
    """Steep where its values are small, or flat on a high plain."""
    steep = lambda d: jnp.sum(jnp.sin(99 * jnp.pi * d)) + 0.01 * (jnp.array(CT) @ d)
    high = lambda d: 100 + jnp.array(CT) @ d
    for f, less in ((steep, "score"), (high, "through")):
        through, p = over_classes(f, sg.sample.categorical_given)
        spread = {"through": variance(through, p), "score": variance(by_score(f), p)}
        assert spread[less] < min(spread.values()) + 1e-9
        assert max(spread.values()) > 100 * spread[less]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_other_temperatures_bias_linear_functions_too(temperature):
    """Of ReinMax, and of straight-through if drawn at another than differentiated."""
    reinmax = lambda d, x: sg.sample.reinmax_given(d, x, temperature)
    other = lambda d, x: sg.sample.categorical_given(d, x, 1.0, temperature)
    for given in (reinmax, other):
        mean, truth = enumerated(FUNCTIONS["linear"], given, X)
        assert np.abs(mean - truth).max() > 0.01


def test_bernoulli_by_the_identity_is_biased_for_linear_functions():
    grad = jax.grad(lambda x: 3 * sg.sample.bernoulli_given(1.0, x))(0.7)
    p = jax.nn.sigmoid(0.7)
    assert grad == 3 != 3 * p * (1 - p)


# Gumbel-softmax of two classes, whose noises differ by logistic noise -----------------

LOGIT = 0.8
STEPS = 0.01 * (np.arange(8000) - 3999.5)  # none is 0, where the class changes


def two_classes(f, temperature, hard):
    """Return gradients by the first logit at each z / temperature, and weights."""
    noise = temperature * STEPS - LOGIT
    weights = np.exp(-np.abs(noise)) / (1 + np.exp(-np.abs(noise))) ** 2
    weights *= temperature * (STEPS[1] - STEPS[0])
    noises = jnp.stack([jnp.array(noise, jnp.float32), jnp.zeros(len(noise))], -1)

    def value(x, g):
        return f(sg.sample.gumbel_softmax_given(g, x, temperature, hard))

    grads = jax.vmap(jax.grad(value), (None, 0))(f32(LOGIT, 0.0), noises)[:, 0]
    return np.float64(grads), weights


def truth(f):
    p = 1 / (1 + np.exp(-LOGIT))
    return p * (1 - p) * float(f(f32(1, 0)) - f(f32(0, 1)))


POWERS = {
    "linear": lambda d: f32(1.0, -2.0) @ d,
    "quadratic": lambda d: (f32(1.0, -2.0) @ d) ** 2,
    "cubic": lambda d: (f32(1.0, -2.0) @ d) ** 3,
}


def bias(name, temperature, hard):
    grads, weights = two_classes(POWERS[name], temperature, hard)
    return abs(weights @ grads - truth(POWERS[name])) / abs(truth(POWERS[name]))


@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_bias_of_gumbel_softmax_as_the_temperature_falls(name, hard):
    """It goes to 0 with the temperature, but for a cubic function and hard draws."""
    biases = [bias(name, t, hard) for t in (1.0, 0.02, 0.005)]
    assert biases[0] > 0.05
    if hard and name == "cubic":
        assert biases[2] > 0.05
    else:
        assert biases[2] < max(biases[1] / 3, 1e-3)


def test_its_variance_is_as_one_over_the_temperature():
    """The mean square tends to slope**2 * p * (1 - p) / (6 * temperature)."""
    p = 1 / (1 + np.exp(-LOGIT))
    for t, hard in ((0.02, True), (0.01, True), (0.01, False)):
        grads, weights = two_classes(POWERS["linear"], t, hard)
        np.testing.assert_allclose(
            weights @ grads**2, 9 * p * (1 - p) / 6 / t, rtol=0.01
        )


# Price --------------------------------------------------------------------------------


def exponentials(f, *args):
    grad = jax.grad(lambda x, *more: jnp.sum(jnp.sin(f(x, *more))))
    return primitives(grad, *args).count("exp")


def test_the_number_of_softmaxes():
    d, g = jnp.array(ONE_HOT[0]), jnp.zeros(4)
    given = sg.sample
    assert exponentials(lambda x: given.categorical_given(d, x), X) == 1
    assert exponentials(lambda x: given.reinmax_given(d, x), X) == 2
    assert exponentials(lambda x: given.gumbel_softmax_given(g, x, 0.5), X) == 1


def test_gumbel_rao_has_a_softmax_for_each_draw_of_noise():
    grad = jax.grad(lambda x: sg.sample.gumbel_rao(jax.random.key(0), x, 1.0, 7)[0])
    text = str(jax.make_jaxpr(grad)(X))
    assert "f32[7,4] = exp " in text
    assert "f32[4] = exp " not in text.split("f32[7,4] = exp ")[-1]
