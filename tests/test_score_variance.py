"""What the docstrings of `score` say of variances, by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, primitives
from test_score import ORDERS, THETA, TRAJECTORIES, trajectory, weights

import stopgrad_jax as sg

LOGITS = {
    "three": (f32(0.3, -1.0, 0.8), f32(3.0, 4.0, 7.0)),
    "two": (f32(0.0, 0.4), f32(5.0, 6.0)),
    "rare": (f32(0.0, -3.0, 0.5), f32(1.0, 40.0, -2.0)),
    "alike": (f32(0.1, 0.2, 0.3), f32(2.0, 2.0, 2.0)),
}
every_choice = pytest.mark.parametrize(("logits", "costs"), LOGITS.values(), ids=LOGITS)


def moments(logits, costs):
    """Return probabilities, derivatives of log-probabilities and costs, in float64."""
    x = np.float64(logits)
    p = np.exp(x) / np.exp(x).sum()
    return p, np.eye(len(p)) - p, np.float64(costs)


def with_constant(logits, costs, b):
    """Return the variance of one sample's gradient, entry by entry, in closed form."""
    p, s, c = moments(logits, costs)
    return p @ ((c - b)[:, None] * s) ** 2 - (p @ (c[:, None] * s)) ** 2


def enumerated(logits, costs, n, baseline):
    """Mean and variance of the gradient over all draws of n samples."""
    p, _, _ = moments(logits, costs)
    draws = np.array(list(itertools.product(range(len(p)), repeat=n)))
    chance = np.prod(p[draws], 1)

    def gradient(index):
        def loss(x):
            drawn = costs[index]
            b = baseline(drawn)
            log_prob = jax.nn.log_softmax(x)[index]
            return sg.score.score_loss(drawn, log_prob, b).mean()

        return jax.grad(loss)(logits)

    each = np.float64(jax.jit(jax.vmap(gradient))(jnp.array(draws)))
    mean = chance @ each
    return mean, chance @ (each - mean) ** 2


@every_choice
@pytest.mark.parametrize("n", [2, 4])
def test_leave_one_out(logits, costs, n):
    """Unbiased; of the variance that its docstring gives."""
    mean, variance = enumerated(logits, costs, n, sg.score.leave_one_out)
    p, s, c = moments(logits, costs)
    of_cost, of_s = p @ (c - p @ c) ** 2, p @ s**2
    covariance = p @ (c[:, None] * s)
    np.testing.assert_allclose(mean, covariance, atol=1e-4)
    constant = with_constant(logits, costs, p @ c) / n
    more = (of_cost * of_s + covariance**2) / (n * (n - 1))
    np.testing.assert_allclose(variance, constant + more, rtol=1e-4, atol=1e-6)


def test_leave_one_out_is_the_sample_covariance():
    costs, logits = f32(1.0, 4.0, -2.0, 7.0), f32(0.1, 0.2, 0.3)
    index = jnp.array([0, 2, 1, 2])

    def loss(x):
        log_prob = jax.nn.log_softmax(x)[index]
        b = sg.score.leave_one_out(costs)
        return sg.score.score_loss(costs, log_prob, b).mean()

    s = np.float64(jax.jacobian(lambda x: jax.nn.log_softmax(x)[index])(logits))
    expected = [np.cov(costs, column)[0, 1] for column in s.T]
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-5)


def test_the_best_constant_can_have_much_less():
    """So no small multiple of its variance bounds that of leave-one-out."""
    logits, costs = LOGITS["rare"]
    p, s, c = moments(logits, costs)
    best = (p @ (c[:, None] * s**2)) / (p @ s**2)
    _, variance = enumerated(logits, costs, 4, sg.score.leave_one_out)
    ratio = variance / np.diag(with_constant_of_each(logits, costs, best) / 4)
    assert ratio.max() > 4


def with_constant_of_each(logits, costs, baselines):
    return np.stack([with_constant(logits, costs, b) for b in baselines])


@every_choice
def test_the_best_constant_baseline(logits, costs):
    """The mean of cost * s**2 over that of s**2, for each entry its own."""
    p, s, c = moments(logits, costs)
    best = (p @ (c[:, None] * s**2)) / (p @ s**2)
    for entry, b in enumerate(best):
        least = with_constant(logits, costs, b)[entry]
        for other in (b - 0.1, b + 0.1, p @ c, 0.0):
            assert least <= with_constant(logits, costs, other)[entry] + 1e-12
    # What is enumerated is what the library does.
    constant = float(best[0])
    mean, variance = enumerated(logits, costs, 2, lambda drawn: constant)
    np.testing.assert_allclose(mean, p @ (c[:, None] * s), atol=1e-4)
    expected = with_constant(logits, costs, constant) / 2
    np.testing.assert_allclose(variance, expected, rtol=1e-4, atol=1e-5)


def test_a_number_added_to_all_costs():
    """No mean changes; the variance is quadratic in it, by the variance of s."""
    logits, costs = LOGITS["three"]
    p, s, c = moments(logits, costs)
    added = [0.0, 10.0, 20.0]
    means, variances = zip(
        *(enumerated(logits, costs + a, 1, lambda drawn: None) for a in added),
        strict=True,
    )
    for mean in means:
        np.testing.assert_allclose(mean, p @ (c[:, None] * s), atol=1e-4)
    square = (variances[0] - 2 * variances[1] + variances[2]) / 200
    np.testing.assert_allclose(square, p @ s**2, rtol=1e-3)


# DiCE -------------------------------------------------------------------------------

GAMMA = 0.9


def spread(order, baseline, decay=1.0):
    """Return the variance of a derivative of all trajectories, summed over entries."""

    def total(theta, actions):
        logs, costs = trajectory(theta, actions)
        b = baseline(jnp.asarray(actions, jnp.float32))
        return sg.score.dice(logs, costs, discount=GAMMA, baseline=b, decay=decay)

    f = jax.grad(total)
    for _ in range(order - 1):
        f = jax.jacfwd(f)
    each = jax.jit(jax.vmap(f, (None, 0)))(THETA, jnp.array(TRAJECTORIES))
    centered = each - jnp.tensordot(weights(), each, 1)[None]
    return float(jnp.sum(jnp.tensordot(weights(), centered**2, 1)))


def near(a):
    return jnp.stack([1.5 + 0 * a[0], 1 + 0.5 * a[0], 0.3 - a[0] * a[1]])


def far(a):
    return 100 + near(a)


@pytest.mark.parametrize("order", ORDERS)
def test_a_near_baseline_lowers_and_a_far_one_raises_every_derivative(order):
    none = lambda a: jnp.zeros(3)
    assert spread(order, near) < spread(order, none) < spread(order, far) / 10


def test_decay_lowers_the_variance_of_higher_derivatives_here():
    for order in (2, 3):
        assert spread(order, near, 0.5) < spread(order, near)
    np.testing.assert_allclose(spread(1, near, 0.5), spread(1, near), rtol=1e-5)


def test_what_is_known_is_known_under_jit_too():
    """A decay of 1 needs no loop; a number that is none is refused."""
    logs, costs = f32(-1.0, -2.0), f32(1.0, 2.0)
    assert "scan" not in primitives(jax.jit(sg.score.dice), logs, costs)
    decayed = jax.jit(lambda x: sg.score.dice(x, costs, decay=0.5))
    assert "scan" in primitives(decayed, logs)
    for wrong in ({"discount": 1.5}, {"decay": -0.1}):
        f = jax.jit(lambda x, wrong=wrong: sg.score.dice(x, costs, **wrong))
        with pytest.raises(ValueError, match="is from 0 to 1"):
            f(logs)
