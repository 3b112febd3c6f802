"""`untrained="freeze"`: what the loss cannot train is frozen, by a batch to look at."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import f32, mesh
from test_train import assert_same_bits
from test_train_untrained import ADAMW, WARNS, X, base, params, stopped

from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def keyed(p, x, key):
    return stopped(p, x) + 0 * jax.random.normal(key)


def test_a_batch_is_looked_at_when_the_state_is_made():
    step = make_step(stopped, ADAMW, untrained="freeze")
    with pytest.raises(
        ValueError,
        match=r"init\(params\)[\s\S]*a batch to look at[\s\S]*no batch[\s\S]*write: "
        r"step\.init\(params, batch\)",
    ):
        step.init(params())
    # An array, a shape, in a program, abstractly; None is a batch too.
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    whole = jax.tree.structure(step.init(params(), X))
    for state in (
        step.init(params(), shape),
        jax.jit(step.init)(params(), X),
        jax.eval_shape(step.init, params(), X),
    ):
        assert jax.tree.structure(state) == whole
    nothing = make_step(lambda p, _: stopped(p, X), ADAMW, untrained="freeze")
    assert jax.tree.structure(nothing.init(params(), None)) == whole
    with_key = make_step(keyed, ADAMW, untrained="freeze")
    key = jax.random.key(0)
    assert jax.tree.structure(with_key.init(params(), X, key)) == whole
    # In the other modes a batch is not needed, and changes nothing.
    plain = make_step(base, ADAMW)
    p = {"w": params()["w"]}
    jax.tree.map(assert_same_bits, plain.init(p), plain.init(p, X))


def test_a_run_is_resumed_by_a_fresh_step():
    first, second = (make_step(stopped, ADAMW, untrained="freeze") for _ in range(2))
    state, _ = first(first.init(params(), X), X)
    saved = pickle.dumps(jax.device_get(state))
    expected, _ = first(state, X)
    ours, _ = second(pickle.loads(saved), X)
    jax.tree.map(assert_same_bits, ours, expected)


def test_a_leaf_that_another_batch_trains_is_not_left_behind():
    """What looks untrained at the first batch may be trained by one of another form."""

    def loss(p, batch):
        out = base(p, batch["x"])
        return out + jnp.mean(p["u"] * batch["y"]) if "y" in batch else out

    step = make_step(loss, ADAMW, untrained="freeze")
    state, _ = step(step.init(params(), {"x": X}), {"x": X})
    with pytest.raises(
        ValueError,
        match=r'freezes what no batch trains[\s\S]*a batch that trains "u"[\s\S]*'
        r"write: step\.init",
    ):
        step(state, {"x": X, "y": X})
    # The other way round it is told, as what decays.
    step = make_step(loss, ADAMW, untrained="freeze")
    state = step.init(params(), {"x": X, "y": X})
    with WARNS(match='"u": the loss is not computed from it'):
        step(state, {"x": X})


def test_thawing_by_another_loss():
    part = make_step(stopped, ADAMW, untrained="freeze")
    whole = make_step(lambda p, x: base(p, x + p["u"]), ADAMW, untrained="freeze")
    p = params()
    state, _ = part(part.init(p, X), X)
    moments = np.array(state.opt_state[0].mu["w"])
    state = whole.migrate(state, part, X)
    np.testing.assert_array_equal(state.opt_state[0].mu["w"], moments)
    np.testing.assert_array_equal(state.opt_state[0].mu["u"], 0)
    state, _ = whole(state, X)
    assert not jnp.array_equal(state.params["u"], p["u"])
    assert not p["u"].is_deleted()
    back = part.migrate(state, whole)
    kept = np.array(back.params["u"])
    state, _ = part(back, X)
    assert_same_bits(state.params["u"], kept)


def test_with_every_other_option():
    weighted = lambda p, x, key: (
        (jnp.sum((p["w"] * x + jnp.round(p["u"][0])) ** 2), x.size),
        jax.random.key_data(key),
    )
    step = make_step(
        weighted,
        ADAMW,
        untrained="freeze",
        weighted=True,
        has_aux=True,
        accumulate=3,
        nonfinite="skip",
        stats=["p/u", "p/w"],
    )
    p = {"w": f32(2.0)[0], "u": X}
    key = jax.random.key(0)
    state, metrics = step(step.init(p, X, key), X, key)
    assert state.params["u"] is p["u"]
    assert metrics["nonfinite"] == {"w": False}
    assert "round" in metrics["stats"]["p/u"].cause
    state, _ = fit(step, state, lambda n: X, steps=3, key=key, progress=False)
    assert state.params["u"] is p["u"]


def test_on_many_devices():
    p, x = {"w": f32(2.0)[0], "u": f32(1.0)[0]}, jnp.arange(8.0)
    batch = jax.device_put(x, jax.sharding.NamedSharding(mesh(), P("d")))
    step = make_step(stopped, ADAMW)
    with WARNS(match='"u": stop_gradient'):
        state, _ = step(step.init(p), batch)
    np.testing.assert_allclose(state.params["u"], 0.95, rtol=1e-6)
    step = make_step(stopped, ADAMW, untrained="freeze")
    state, _ = step(step.init(p, batch), batch)
    assert state.params["u"] == 1.0
