"""Running statistics and counts of random numbers among the parameters of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stopgrad_jax as sg

nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

pytestmark = pytest.mark.usefixtures("usual_settings")
X = jnp.arange(12.0).reshape(4, 3)
SGD = optax.sgd(0.1)


class Net(nnx.Module):
    def __init__(self, rngs, rate=None):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = (lambda x: x) if rate is None else nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)))


GRAPHDEF, VARIABLES = nnx.split(Net(nnx.Rngs(0)))
DROPS, DROPPED = nnx.split(Net(nnx.Rngs(0), 0.5))


def loss(p, x):
    return jnp.mean((nnx.merge(GRAPHDEF, p, copy=True)(x) - 1) ** 2)


def with_statistics(p, x, key=None):
    model = nnx.merge(DROPS if "drop" in p else GRAPHDEF, p, copy=True)
    if key is not None:
        nnx.reseed(model, default=key)
    return jnp.mean((model(x) - 1) ** 2), nnx.state(model, nnx.BatchStat)


def is_statistic(path, leaf):
    return isinstance(leaf, nnx.BatchStat)


def refused(step, variables, *args):
    with pytest.raises(ValueError, match="make_step") as caught:
        step(step.init(variables), *args)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("frozen", "write"),
    [
        (None, "frozen=lambda path, leaf: isinstance(leaf, nnx.BatchStat)"),
        ("out", 'frozen=["out", "norm/mean", "norm/var"]'),
        (lambda path, leaf: "out" in path, "a `frozen` that selects these too"),
    ],
)
def test_statistics_are_not_trained(frozen, write):
    step = sg.train.make_step(loss, SGD, frozen=frozen)
    message = refused(step, VARIABLES, X)
    assert 'got: running statistics (nnx.BatchStat) at "norm/mean", "norm/var"' in (
        message
    )
    assert f"write: {write}; where the loss makes new ones, has_aux=True" in message
    # What it says to write, alone: the statistics would never move.
    step = sg.train.make_step(loss, SGD, frozen=["norm/mean", "norm/var"])
    message = refused(step, VARIABLES, X)
    assert "read only for what is thrown away: they never move" in message
    assert "nnx.state(model, nnx.BatchStat) in aux" in message
    assert "and state.replace(params=...) with them after each step" in message
    # And with the rest of it they move as nnx moves them.
    step = sg.train.make_step(with_statistics, SGD, frozen=is_statistic, has_aux=True)
    _, metrics = step(step.init(VARIABLES), X)
    mean = metrics["aux"]["norm"]["mean"][...]
    model = nnx.merge(GRAPHDEF, VARIABLES, copy=True)
    model(X)
    np.testing.assert_allclose(mean, model.norm.mean[...], rtol=1e-6)


def test_statistics_that_are_only_read_are_no_fault():
    """In use they do not move, and nothing is thrown away."""
    fixed = lambda p, x: jnp.mean((p["w"] * x - p["batch_stats"]["mean"]) ** 2)
    p = {"w": jnp.ones(3), "params": 0.0, "batch_stats": {"mean": jnp.ones(3)}}
    frozen = ["batch_stats", "params"]
    step = sg.train.make_step(fixed, SGD, frozen=frozen)
    state, _ = step(step.init(p), X)
    assert np.array_equal(state.params["batch_stats"]["mean"], np.ones(3))


def test_random_numbers_change_from_step_to_step():
    step = sg.train.make_step(with_statistics, SGD, frozen=is_statistic, has_aux=True)
    message = refused(step, DROPPED, X)
    assert 'counts of random numbers at "drop/rngs/count" that never move' in message
    assert "nnx.reseed(model, default=key) first in loss(model, batch, key)" in message
    keys = map(jax.random.key, range(4))
    losses = {float(step(step.init(DROPPED), X, key)[1]["loss"]) for key in keys}
    assert len(losses) > 1


@pytest.mark.parametrize("below", [(), ("actor",)])
def test_the_collection_of_linen(below):
    """`{"params": ..., "batch_stats": ...}`, wherever it is."""
    variables = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.zeros(3)}}
    whole = {below[0]: variables, "critic": jnp.ones(())} if below else variables
    at = "/".join((*below, "batch_stats"))

    def objective(p, x):
        p = p[below[0]] if below else p
        return jnp.mean((p["params"]["w"] * (x - p["batch_stats"]["mean"])) ** 2)

    step = sg.train.make_step(objective, SGD, untrained="ignore")
    message = refused(step, whole, X)
    assert f'the collection "batch_stats" at "{at}"' in message
    assert f'write: frozen="{at}"; where the loss makes new ones' in message
    step = sg.train.make_step(objective, SGD, frozen=at, untrained="ignore")
    state, _ = step(step.init(whole), X)
    inner = state.params[below[0]] if below else state.params
    assert np.array_equal(inner["batch_stats"]["mean"], np.zeros(3))


def test_a_dict_of_that_name_alone_is_parameters():
    """Without `params` beside it, the name tells nothing."""
    objective = lambda p, x: jnp.mean((x - p["batch_stats"]) ** 2)
    step = sg.train.make_step(objective, SGD)
    state, _ = step(step.init({"batch_stats": jnp.zeros(3)}), X)
    # The derivative of the mean of twelve squares by each of three, times the rate.
    expected = 0.1 * 2 * np.asarray(X).sum(0) / 12
    np.testing.assert_allclose(state.params["batch_stats"], expected, rtol=1e-6)


def test_the_state_of_equinox():
    class Module(eqx.Module):
        norm: eqx.nn.BatchNorm
        out: eqx.nn.Linear

        def __init__(self, key):
            self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
            self.out = eqx.nn.Linear(3, 1, key=key)

        def __call__(self, x, state):
            x, state = self.norm(x, state)
            return self.out(x)[0], state

    def objective(p, x):
        over = {"in_axes": (0, None), "out_axes": (0, None)}
        y, new = jax.vmap(p[0], axis_name="batch", **over)(x, p[1])
        return jnp.mean((y - 1) ** 2), new

    pair = eqx.nn.make_with_state(Module)(jax.random.key(0))
    step = sg.train.make_step(objective, SGD, has_aux=True)
    message = refused(step, pair, X)
    assert 'a state (eqx.nn.State) at "1"' in message
    assert 'write: frozen="1"; where the loss makes new ones, has_aux=True' in message
    step = sg.train.make_step(lambda p, x: objective(p, x)[0], SGD, frozen="1")
    message = refused(step, pair, X)
    assert "with the state that the model returns in aux" in message
    step = sg.train.make_step(objective, SGD, frozen="1", has_aux=True)
    _, metrics = step(step.init(pair), X)
    assert isinstance(metrics["aux"], eqx.nn.State)
