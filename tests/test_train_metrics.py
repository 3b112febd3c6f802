"""What a step tells beside its loss: nonfinite gradients, and sizes of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32
from test_train import BATCH, X, Y, assert_same_bits, loss, params, run

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
NAN = (X.at[0, 0].set(jnp.nan), Y)


def test_nonfinite_gradients_are_named():
    def fun(p, batch):
        return loss(p, batch) + jnp.sum(p["fine"]) ** 2

    p = {**params(), "fine": f32(1.0)}
    step = make_step(fun, optax.adam(1e-2), nonfinite="report")
    state, metrics = step(step.init(p), BATCH)
    assert metrics["nonfinite"] == {"encoder": False, "fine": False, "head": False}
    state, metrics = step(state, NAN)
    assert metrics["nonfinite"] == {"encoder": True, "fine": False, "head": True}
    assert jnp.isnan(state.params["head"]).all()
    # Where gradients are finite, the update is looked at: 1 / 0 here.
    bad = optax.stateless_with_tree_map(lambda g, p: jnp.where(p < 0, g / 0.0, g))
    step = make_step(loss, bad, frozen="encoder", nonfinite="report")
    _, metrics = step(step.init(params()), BATCH)
    assert metrics["nonfinite"] == {"head": True}


ALIKE = {"mlp/lin": {"w": f32(1.0)}, "mlp": {"lin": {"w": f32(0.0)}}}
FLAT, DEEP = "['mlp/lin']/['w']", "['mlp']/['lin']/['w']"


def alike(p, x):
    """The derivative of the root at 0 is infinite."""
    return jnp.sum(p["mlp/lin"]["w"] * x + jnp.sqrt(p["mlp"]["lin"]["w"] * x))


@pytest.mark.parametrize("nonfinite", ["report", "skip"])
def test_paths_that_are_printed_alike_are_told_apart(nonfinite):
    step = make_step(alike, optax.sgd(0.1), nonfinite=nonfinite)
    _, metrics = step(step.init(ALIKE), f32(1.0))
    assert metrics["nonfinite"] == {FLAT: False, DEEP: True}
    assert metrics["zero"] == {FLAT: False, DEEP: False}
    _, metrics = step(step.init(ALIKE), f32(0.0))
    assert metrics["zero"] == {FLAT: True, DEEP: False}  # nan
    keys = sg.gradient_stats(alike, "p")(ALIKE, f32(1.0)).keys()
    assert keys == {f"p/{FLAT}", f"p/{DEEP}"}


def test_where_one_of_them_is_frozen_the_other_is_called_as_it_was():
    frozen = {"mlp/lin": {"w": False}, "mlp": {"lin": {"w": True}}}
    step = make_step(alike, optax.sgd(0.1), nonfinite="report", frozen=frozen)
    _, metrics = step(step.init(ALIKE), f32(1.0))
    assert metrics["nonfinite"] == {"mlp/lin/w": False}


def test_sizes_at_paths_that_are_printed_alike_are_compared():
    batch = {"a/b": jnp.ones((4, 1)), "a": {"b": jnp.ones((6, 1))}}
    fun = lambda p, x: p["w"] * jnp.sum(x["a/b"]) + jnp.sum(x["a"]["b"])
    step = make_step(fun, optax.sgd(0.1), accumulate=2)
    sizes = r"leading sizes \{.*'a'.*6.*'a/b'.*4\}"
    with pytest.raises(ValueError, match=sizes):
        step(step.init({"w": f32(1.0)[0]}), batch)
    step = make_step(lambda p, x: p["w"] * jnp.sum(x["a/b"]), optax.sgd(0.1))
    with pytest.raises(ValueError, match=sizes):
        fit(step, step.init({"w": f32(1.0)[0]}), batch, steps=2, progress=False)


def test_a_state_of_other_shapes_at_paths_that_are_printed_alike_is_refused():
    wrong = {"mlp/lin": {"w": f32(1.0, 2.0)}, "mlp": {"lin": {"w": f32(0.0)}}}
    step = make_step(alike, optax.adam(0.1))
    state = step.init(ALIKE)
    for other in (
        wrong,
        {"mlp/lin": wrong["mlp"]["lin"], "mlp": {"lin": wrong["mlp/lin"]}},
    ):
        with pytest.raises(ValueError, match=r"optimizer's state[\s\S]*\[2\] at"):
            step(state.replace(opt_state=step.init(other).opt_state), f32(1.0))


def test_one_array_is_called_as_the_loss_calls_it():
    shift = lambda w, x: jnp.sum((w - x) ** 2)
    partial = functools.partial(lambda scale, w, x: scale * shift(w, x), 2.0)
    method = Model().loss
    for fun, name in ((shift, "w"), (partial, "w"), (method, "weights")):
        step = make_step(fun, optax.sgd(0.1), nonfinite="report", stats=name)
        _, metrics = step(step.init(f32(1.0, 2.0)), f32(1.0, np.inf))
        assert metrics["nonfinite"] == {name: True}
        assert list(metrics["stats"]) == list(metrics["zero"]) == [name]
    nameless = make_step(lambda *args: shift(*args), optax.sgd(0.1), nonfinite="skip")
    _, metrics = nameless(nameless.init(1.0), f32(1.0))
    assert metrics["nonfinite"] == {"params": False}


class Model:
    def loss(self, weights, x):
        return jnp.sum((weights - x) ** 2)


def test_gradients_that_underflow_are_finite_and_told():
    """float16 has nothing between 0 and 6e-8: 1e-3 of the head's 1e-5 is gone."""

    def fun(p, x):
        y = (p["w"] * x).astype(jnp.float16) * jnp.float16(1e-4)
        return jnp.mean(y * jnp.float16(1e-4) * p["small"].astype(jnp.float16))

    half = {"w": jnp.float16(1.0), "small": jnp.float16(1.0)}
    mixed = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    for p in (half, mixed):
        step = make_step(fun, optax.sgd(0.1), nonfinite="report", stats="p/w")
        _, metrics = step(step.init(p), jnp.ones(4, jnp.float16))
        assert metrics["nonfinite"] == {"small": False, "w": False}
        assert metrics["zero"] == {"small": True, "w": True}
        assert metrics["stats"]["p/w"].zero_fraction == 1
    # In bfloat16, which has the range of float32, it is there; nan is not zero.
    wide = lambda p, x: jnp.mean(p["w"] * x * 1e-4) * 1e-4 * p["small"]
    step = make_step(wide, optax.sgd(0.1), nonfinite="report")
    for scale, nan in ((1.0, False), (np.nan, True)):
        p = jax.tree.map(jnp.bfloat16, half)
        _, metrics = step(step.init(p), jnp.full(4, scale, jnp.bfloat16))
        assert metrics["zero"] == {"small": False, "w": False}
        assert metrics["nonfinite"] == {"small": nan, "w": nan}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_steps_change_nothing_but_the_count(accumulate):
    step = make_step(
        loss,
        optax.adamw(1e-2),
        frozen="encoder",
        nonfinite="skip",
        accumulate=accumulate,
        donate=False,
    )
    before, _ = run(step, step.init(params()), 2)
    skipped, metrics = step(before, NAN)
    assert jnp.isnan(metrics["loss"])
    assert metrics["nonfinite"] == {"head": True}
    jax.tree.map(assert_same_bits, skipped.params, before.params)
    jax.tree.map(assert_same_bits, skipped.opt_state, before.opt_state)
    assert skipped.step == before.step + 1
    after, _ = step(skipped, BATCH)
    expected, _ = step(before, BATCH)
    jax.tree.map(assert_same_bits, after.params, expected.params)


def test_sizes_of_gradients_are_metrics():
    def fun(p, batch):
        x, y = batch
        h = sg.name(jnp.tanh(x @ p["encoder"]), "h")
        return jnp.mean((h @ p["head"] - y) ** 2) + 0 * jnp.sum(p["unused"])

    p = {**params(), "unused": jnp.ones(2)}
    plain = make_step(fun, optax.adam(1e-2), frozen="unused")
    asked = make_step(
        fun, optax.adam(1e-2), frozen="unused", stats=["h", "p/head", "p/unused"]
    )
    expected, losses = run(plain, plain.init(p), 3)
    state, metrics = asked(asked.init(p), BATCH)
    x, y = BATCH
    h = jnp.tanh(x @ p["encoder"])
    grad = 2 / 8 * (h @ p["head"] - y)[:, None] * p["head"][None]  # of the mean by h
    stats = metrics["stats"]
    np.testing.assert_allclose(stats["h"].norm, jnp.linalg.norm(grad), rtol=1e-5)
    head = jnp.linalg.norm(jax.grad(fun)(p, BATCH)["head"])
    np.testing.assert_allclose(stats["p/head"].norm, head, rtol=1e-5)
    assert stats["p/unused"].norm == 0
    state, ours = run(asked, asked.init(p), 3)
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    np.testing.assert_allclose(state.params["head"], expected.params["head"], rtol=1e-5)
    # Of micro-batches: each its own.
    halves = make_step(fun, optax.adam(1e-2), stats="h", accumulate=2)
    _, metrics = halves(halves.init(p), BATCH)
    each = [2 * jnp.linalg.norm(grad[i::2]) for i in range(2)]
    np.testing.assert_allclose(metrics["stats"]["h"].norm, each, rtol=1e-5)
    # In a loop of steps, and with a cause where nothing comes
    stopped = lambda p, batch: fun(jax.lax.stop_gradient(p), batch) + p["head"][0]
    step = make_step(
        stopped, optax.sgd(0.1), stats=["p/encoder", "p/head"], untrained="ignore"
    )
    _, history = fit(
        step, step.init(p), lambda n: BATCH, steps=4, log_every=2, progress=False
    )
    assert history["stats"]["p/head"].norm.shape == (4,)
    assert history["stats"]["p/encoder"].cause.startswith("stop_gradient")
    wrong = make_step(fun, optax.sgd(0.1), stats="hh")
    state = wrong.init(p)
    with pytest.raises(sg.AddressError, match=r"make_step\(fun[\s\S]*hh"):
        wrong(state, BATCH)
