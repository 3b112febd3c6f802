"""Losses that divide by a number computed from the batch, wherever they do."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32

from stopgrad_jax.train import make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=8), jnp.float32)
MASK = jnp.asarray([1, 0, 0, 1, 0, 1, 0, 1], bool)
W = f32(0.5, -1.0, 2.0)
BATCH = (X, Y, MASK)


def squares(w, batch):
    return (batch[0] @ w - batch[1]) ** 2


def inside_the_sum(w, batch):
    return jnp.sum(squares(w, batch) * batch[2] / jnp.sum(batch[2]))


def by_weights(w, batch):
    weights = batch[2] / jnp.sum(batch[2])
    return jnp.sum(squares(w, batch) * weights)


def by_weights_of_a_product(w, batch):
    return squares(w, batch) @ (batch[2] / jnp.maximum(1.0, jnp.sum(batch[2])))


def by_kept_dimensions(w, batch):
    mask = batch[2].astype(jnp.float32)[:, None]
    return jnp.sum(squares(w, batch)[:, None] * mask / mask.sum(0, keepdims=True))


def by_a_dot_product(w, batch):
    mask = batch[2].astype(jnp.float32)
    return jnp.mean(squares(w, batch) * mask / (mask @ mask))


def by_a_power(w, batch):
    return jnp.sum(squares(w, batch) * batch[2]) * jnp.sum(batch[2]) ** -1.0


def by_a_whole_power(w, batch):
    return jnp.sum(squares(w, batch) * batch[2].astype(jnp.float32).sum() ** -1)


def by_a_reciprocal(w, batch):
    count = jnp.sum(batch[2].astype(jnp.float32))
    return jnp.sum(squares(w, batch) * batch[2] * jnp.reciprocal(count))


@jax.jit
def normalized(weights):
    return weights / jnp.clip(jnp.sum(weights), 1.0)


def in_a_jitted_function(w, batch):
    return jnp.sum(squares(w, batch) * normalized(batch[2]))


def counted_in_a_jitted_function(w, batch):
    count = jax.jit(lambda mask: jnp.maximum(jnp.sum(mask), 1))(batch[2])
    return jnp.sum(jnp.where(batch[2], squares(w, batch), 0.0) / count)


def guarded(w, batch):
    count = jnp.sum(batch[2].astype(jnp.float32))
    count = jnp.where(count > 0, count, 1.0)
    return jnp.sum(jnp.where(count > 0, squares(w, batch) * batch[2] / count, 0.0))


def importance(w, batch):
    weights = jnp.exp(batch[0] @ w / 4)
    return jnp.sum(batch[1] * (weights / jnp.sum(weights)))


def in_a_rule(w, batch):
    @jax.custom_vjp
    def mean(losses, mask):
        return jnp.sum(losses * (mask / jnp.sum(mask)))

    def fwd(losses, mask):
        return mean(losses, mask), mask / jnp.sum(mask)

    mean.defvjp(fwd, lambda weights, ct: (ct * weights, None))
    return mean(squares(w, batch), batch[2].astype(jnp.float32))


def one_after_another(w, batch):
    def body(sums, example):
        x, y, keep = example
        return (sums[0] + keep * (x @ w - y) ** 2, sums[1] + keep), None

    (total, count), _ = jax.lax.scan(body, (0.0, 0.0), batch)
    return total / count


def in_a_loop_of_python(w, batch):
    x, y, keep = batch
    total = sum(keep[k] * (x[k] @ w - y[k]) ** 2 for k in range(len(y)))
    return total / sum(keep[k] for k in range(len(y)))


def by_what_was_added_up(w, batch):
    return jnp.sum(squares(w, batch) * batch[2]) / jnp.cumsum(batch[2])[-1]


DIVIDES = [
    one_after_another,
    in_a_loop_of_python,
    by_what_was_added_up,
    inside_the_sum,
    by_weights,
    by_weights_of_a_product,
    by_kept_dimensions,
    by_a_dot_product,
    by_a_power,
    by_a_whole_power,
    by_a_reciprocal,
    in_a_jitted_function,
    counted_in_a_jitted_function,
    guarded,
    importance,
    in_a_rule,
]


def gradient(loss, batch):
    return np.asarray(jax.grad(loss)(W, batch), np.float64)


def parts(loss):
    """The mean of the gradients of both micro-batches, and that of the whole."""
    halves = [jax.tree.map(lambda x, k=k: x[k::2], BATCH) for k in range(2)]
    return sum(gradient(loss, half) for half in halves) / 2, gradient(loss, BATCH)


@pytest.mark.parametrize("loss", DIVIDES, ids=lambda f: f.__name__)
def test_a_mean_inside_the_sum_is_told(loss):
    averaged, whole = parts(loss)
    assert np.abs(averaged - whole).max() > 0.01 * np.abs(whole).max()  # it matters
    step = make_step(loss, optax.sgd(0.1), accumulate=2)
    with pytest.warns(UserWarning, match="each micro-batch counts the same") as caught:
        step(step.init(W), BATCH)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "test_train_divides.py:" in str(caught[0].message)


def by_its_own_length(w, batch):
    x, _, mask = batch
    lengths = jnp.sum(x**2, 1)
    return jnp.mean((x @ w) * mask / lengths)


def by_its_own_score(w, batch):
    return jnp.mean(batch[1] * (batch[0] @ w) / (2 + batch[0] @ jnp.ones(3)))


def one_by_one(w, batch):
    """Each example's own number, in a loop over them."""
    own = lambda x: jnp.sum(x * w) / jnp.sum(x**2)
    return jnp.mean(jax.lax.map(own, batch[0]))


def by_a_parameter_in_the_sum(w, batch):
    return jnp.mean((batch[0] @ w) / jnp.sum(w**2))


def by_the_number_of_examples(w, batch):
    return jnp.sum(squares(w, batch) / len(batch[1]))


def normalized_rewards(w, batch):
    """What every reinforcement learner does, in micro-batches too."""
    rewards = (batch[1] - jnp.mean(batch[1])) / (jnp.std(batch[1]) + 1e-6)
    return -jnp.mean(rewards * (batch[0] @ w))


def behind_a_logarithm(w, batch):
    scores = batch[0] @ w
    return -jnp.mean(jnp.log(jnp.exp(scores) / jnp.sum(jnp.exp(scores))))


def for_the_layer_below(w, batch):
    """A normalized input, of a function that is no multiple of it."""
    x = batch[0] / jnp.sum(jnp.abs(batch[0]))
    return jnp.mean(jnp.tanh(x @ w))


def of_a_constant_choice(w, batch):
    """A predicate and an exponent that are literals in the program."""
    scores = jax.lax.select(True, batch[0] @ w, 2 * batch[1])
    return jnp.mean(jnp.real(jax.lax.pow(scores + 3j, jnp.complex64(-1j))))


def counted_one_after_another(w, batch):
    """The number of examples, whatever is in them."""

    def body(sums, example):
        x, y, _ = example
        return (sums[0] + (x @ w - y) ** 2, sums[1] + 1.0), None

    (total, count), _ = jax.lax.scan(body, (0.0, 0.0), batch)
    return total / count


def added_up_in_python(w, batch):
    x, y, _ = batch
    return sum((x[k] @ w - y[k]) ** 2 for k in range(len(y))) / len(y)


OTHERS = [
    counted_one_after_another,
    added_up_in_python,
    of_a_constant_choice,
    by_its_own_length,
    by_its_own_score,
    one_by_one,
    by_a_parameter_in_the_sum,
    by_the_number_of_examples,
    normalized_rewards,
    behind_a_logarithm,
    for_the_layer_below,
]


@pytest.mark.parametrize("k", [2, 8])  # of eight examples
@pytest.mark.parametrize("loss", OTHERS, ids=lambda f: f.__name__)
def test_other_divisions_are_not_told(loss, k):
    step = make_step(loss, optax.sgd(0.1), accumulate=k)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(step.init(W), BATCH)
    assert not caught
