"""Frozen means frozen, bit for bit, under any optimizer."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import assert_same_bits, f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("standard_promotion")
BEATS = r"[\s\S]*got: [\s\S]*write: "
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 20)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "MultiSteps": optax.MultiSteps(optax.adamw(1e-2), 2),
    "apply_if_finite": optax.apply_if_finite(optax.adamw(1e-2), 3),
    "adafactor": optax.adafactor(1e-2, weight_decay_rate=0.1),
}
SPECIAL = [-0.0, 0.0, np.inf, -np.inf, np.nan, 2e-38, 3.0]


def params(dtype="float32"):
    enc = np.array(SPECIAL).astype(dtype)
    return {"enc": {"w": jnp.asarray(enc)}, "head": f32(1.0, -2.0), "n": jnp.int32(3)}


def gradients(p, step=0):
    """Large at the frozen leaf, so that any norm would show it."""
    enc = jnp.full_like(p["enc"]["w"], 1000.0)
    return {"enc": {"w": enc}, "head": 0.1 * p["head"] + step, "n": jnp.int32(0)}


def train(tx, p, state, steps, grads=gradients):
    for step in range(steps):
        updates, state = tx.update(grads(p, step), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_keep_every_bit_and_the_others_train_alone(name):
    inner = OPTIMIZERS[name]
    tx, p = sg.freeze(inner, "enc"), params()
    after, state = train(tx, p, tx.init(p), 4)
    assert_same_bits(after["enc"]["w"], p["enc"]["w"])
    assert after["n"] == 3
    # The others go as if there were nothing else: no norm, no decay counts the frozen.
    alone = {"head": p["head"]}
    only = lambda p, step: {"head": 0.1 * p["head"] + step}
    expected, _ = train(inner, alone, inner.init(alone), 4, only)
    np.testing.assert_array_equal(after["head"], expected["head"])
    assert not jnp.array_equal(after["head"], p["head"])
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert p["enc"]["w"].shape not in shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_every_bit_of_every_dtype(dtype):
    p = params(dtype)
    if dtype == "complex64":
        p["enc"]["w"] = p["enc"]["w"] * 1j - 0.0
    tx = sg.freeze(optax.adamw(1e-2), "enc")
    for step in (tx.update, jax.jit(tx.update)):
        updates, _ = step(gradients(p), tx.init(p), p)
        for add in (optax.apply_updates, jax.jit(optax.apply_updates)):
            assert_same_bits(add(p, updates)["enc"]["w"], p["enc"]["w"])

    @jax.jit
    def whole(p, state):
        updates, state = tx.update(gradients(p), state, p)
        return optax.apply_updates(p, updates), state

    assert_same_bits(whole(p, tx.init(p))[0]["enc"]["w"], p["enc"]["w"])


def test_subnormals_are_lost_by_the_addition_not_by_us():
    """XLA's own addition on a CPU takes them for zero; no update can prevent it."""
    p = {"enc": f32(1e-40), "head": f32(1.0)}
    tx = sg.freeze(optax.sgd(0.1), "enc")
    updates, _ = tx.update({"enc": None, "head": p["head"]}, tx.init(p), p)
    lost = np.array(p["enc"] + jnp.float32(-0.0)) == 0
    kept = np.array(optax.apply_updates(p, updates)["enc"]) != 0
    assert lost != kept


def test_gradients_may_be_none_at_frozen_leaves():
    p = params()
    tx = sg.freeze(OPTIMIZERS["clipped"], "enc")
    none = lambda p, step: gradients(p, step) | {"enc": {"w": None}, "n": None}
    full, _ = train(tx, p, tx.init(p), 3)
    ours, _ = train(tx, p, tx.init(p), 3, none)
    np.testing.assert_array_equal(ours["head"], full["head"])
    assert_same_bits(ours["enc"]["w"], p["enc"]["w"])
    without = sg.freeze(optax.sgd(0.1), "enc")
    state = without.init({"enc": p["enc"], "head": p["head"]})
    updates, _ = without.update({"enc": {"w": None}, "head": p["head"]}, state)
    assert updates["enc"]["w"] == 0
    assert np.signbit(updates["enc"]["w"])


def test_us1():
    """The three recipes of user story 1 drift or do not; ours does not."""
    p0 = {"enc": f32(1.0, 1.0), "head": f32(1.0, 1.0)}
    stop = jax.lax.stop_gradient
    loss = lambda p: jnp.sum((stop(p["enc"]) * p["head"] - 3.0) ** 2)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    grads = lambda p, step: jax.grad(loss)(p)
    drifted, _ = train(tx, p0, tx.init(p0), 100, grads)
    assert drifted["enc"][0] < 0.95
    frozen = sg.freeze(tx, "enc")
    kept, state = train(frozen, p0, frozen.init(p0), 100, grads)
    assert_same_bits(kept["enc"], p0["enc"])
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))
    assert size(state) == size(tx.init({"head": p0["head"]}))


def test_us10():
    """No gradient of the frozen shape in the program, no state of it either."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    p = {"enc": zeros(64, 32), "head": zeros(32)}
    loss = lambda p: jnp.sum(jnp.tanh(p["enc"]) @ p["head"])
    tx = sg.freeze(optax.adamw(1e-3), "enc")

    def step(p, state):
        trained, rest = sg.partition(p, "!enc")
        grads = jax.grad(lambda t: loss(sg.combine(t, rest)))(trained)
        updates, state = tx.update(grads, state, p)
        return grads, optax.apply_updates(p, updates), state

    grads, _, state = jax.eval_shape(step, p, tx.init(p))
    for leaf in jax.tree.leaves((grads, state)):
        assert leaf.shape != (64, 32)
    trained, rest = sg.partition(p, "!enc")
    text = str(jax.make_jaxpr(jax.grad(lambda t: loss(sg.combine(t, rest))))(trained))
    forward = str(jax.make_jaxpr(loss)(p))
    # What has the frozen shape is the forward value alone: tanh, and nothing behind it.
    assert text.count("f32[64,32] = ") == forward.count("f32[64,32] = ")
    query = sg.gradients(loss, "p/head")
    assert str(jax.make_jaxpr(query)(p)).count("f32[64,32] = ") == 1


def test_freezing_begins_and_ends_in_mid_training():
    p, plain = params(), OPTIMIZERS["momentum"]
    p["enc"]["w"] = f32(1.0, 2.0)
    frozen = sg.freeze(plain, "enc")
    floats = {k: p[k] for k in ("enc", "head")}
    grads = lambda p, step: {"enc": {"w": f32(1.0, 1.0)}, "head": p["head"]}
    warm, state = train(plain, floats, plain.init(floats), 5, grads)
    # Momentum alone would move a leaf whose gradient is zero from now on:
    coast = lambda p, step: {"enc": {"w": f32(0.0, 0.0)}, "head": p["head"]}
    moved, _ = train(plain, warm, state, 1, coast)
    assert not jnp.array_equal(moved["enc"]["w"], warm["enc"]["w"])
    inside = sg.migrate_state(state, plain, frozen, warm)
    assert f32(0.0, 0.0).shape not in [
        x.shape for x in jax.tree.leaves(inside[0].trace["enc"])
    ]
    np.testing.assert_array_equal(inside[0].trace["head"], state[0].trace["head"])
    kept, inside = train(frozen, warm, inside, 3, grads)
    assert_same_bits(kept["enc"]["w"], warm["enc"]["w"])
    # Thawed: fresh momentum where it was frozen, the old one elsewhere.
    thawed = sg.migrate_state(inside, frozen, plain, kept)
    np.testing.assert_array_equal(thawed[0].trace["enc"]["w"], 0)
    np.testing.assert_array_equal(thawed[0].trace["head"], inside[0].trace["head"])
    assert jax.tree.structure(thawed) == jax.tree.structure(plain.init(kept))
    on, _ = train(plain, kept, thawed, 1, grads)
    assert not jnp.array_equal(on["enc"]["w"], kept["enc"]["w"])


@pytest.mark.parametrize(
    "name", ["adamw", "schedule", "inject_hyperparams", "MultiSteps"]
)
def test_migrated_state_keeps_counts_and_hyperparameters(name):
    inner = OPTIMIZERS[name]
    tree = {"a": f32(1.0), "b": f32(2.0), "c": f32(3.0)}
    old, new = sg.freeze(inner, "a"), sg.freeze(inner, "b")
    grads = lambda p, step: jax.tree.map(jnp.ones_like, p)
    p, state = train(old, tree, old.init(tree), 3, grads)
    moved = sg.migrate_state(state, old, new, p)
    assert jax.tree.structure(moved) == jax.tree.structure(new.init(p))
    flat = dict(jax.tree_util.tree_leaves_with_path(state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        if path in flat:
            np.testing.assert_array_equal(leaf, flat[path])
        else:
            np.testing.assert_array_equal(leaf, 0)  # of the leaf that is thawed
    back = sg.migrate_state(moved, new, old, p)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    pickled = pickle.loads(pickle.dumps(jax.device_get(moved)))
    assert jax.tree.structure(pickled) == jax.tree.structure(moved)


def test_freezing_in_a_scan_of_steps():
    p = {"enc": f32(1.0, -0.0), "head": f32(1.0, 2.0)}
    tx = sg.freeze(optax.adamw(1e-2, weight_decay=0.1), "enc")

    def step(carry, _):
        p, state = carry
        grads = {"enc": None, "head": p["head"]}
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    (after, _), _ = jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=5)
    )(p)
    assert_same_bits(after["enc"], p["enc"])
    looped = (p, tx.init(p))
    for _ in range(5):
        looped, _ = step(looped, None)
    np.testing.assert_allclose(after["head"], looped[0]["head"], rtol=1e-6)


def test_what_cannot_be_right():
    p = params()
    tx = sg.freeze(optax.adam(0.1), "enc")
    state = tx.init(p)
    with pytest.raises(sg.AddressError, match=r"which matches nothing[\s\S]*enc"):
        sg.freeze(optax.adam(0.1), "encoder").init(p)
    with pytest.raises(ValueError, match='None at "head", which is not frozen'):
        tx.update({"enc": {"w": None}, "head": None, "n": None}, state, p)
    with pytest.raises(ValueError, match=f"the structure of params{BEATS}"):
        tx.update({"head": p["head"]}, state, p)
    with pytest.raises(ValueError, match="only params tell"):
        tx.update({"enc": {"w": None}, "head": p["head"], "n": None}, state)
    with pytest.raises(ValueError, match=f"state is a state of old{BEATS}"):
        sg.migrate_state(state, optax.adam(0.1), tx, {"enc": 1.0})
    with pytest.raises(ValueError, match=f"under another freeze{BEATS}"):
        sg.migrate_state(state, tx, sg.freeze(optax.sgd(0.1), "enc"), p)
    boxed = sg.freeze(optax.sgd(0.1), lambda path, leaf: leaf is p["head"])
    other = p | {"head": p["head"] + 1}
    with pytest.raises((ValueError, sg.AddressError), match=r"where[\s\S]*write: "):
        boxed.update(gradients(other), boxed.init(p), other)


def test_without_params_none_is_frozen_or_no_leaf():
    p = {"a": f32(1.0), "bias": None, "h": f32(2.0)}
    tx = sg.freeze(optax.adam(0.1), "a")
    updates, _ = tx.update({"a": None, "bias": None, "h": p["h"]}, tx.init(p))
    assert updates["bias"] is None
    assert np.signbit(updates["a"])
    asks = sg.freeze(optax.sgd(0.1), lambda path, leaf: leaf.ndim == 1)
    with pytest.raises(TypeError, match=f"params, for a function in where{BEATS}"):
        asks.update({"w": jnp.ones((2, 2)), "b": None}, None)


def test_none_for_a_frozen_subtree():
    p = {"enc": {"w": f32(1.0), "b": f32(2.0)}, "h": f32(3.0)}
    tx = sg.freeze(optax.sgd(0.1), "enc")
    updates, _ = tx.update({"enc": None, "h": p["h"]}, tx.init(p), p)
    assert jax.tree.structure(updates) == jax.tree.structure(p)


def test_states_that_migrate_and_those_that_do_not():
    p = {"a": jnp.ones(3), "h": jnp.ones(2)}
    for make in (optax.sm3, optax.adafactor, optax.lion):
        inner = make(0.1)
        tx = sg.freeze(inner, "a")
        thawed = sg.migrate_state(tx.init(p), tx, inner, p)
        assert jax.tree.structure(thawed) == jax.tree.structure(inner.init(p))
        back = sg.migrate_state(thawed, inner, tx, p)
        assert jax.tree.structure(back) == jax.tree.structure(tx.init(p))
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match=f"a state of old on these params{BEATS}"):
        sg.migrate_state(adam.init({"w": jnp.ones(3)}), adam, adam, {"w": jnp.ones(5)})
    with pytest.raises(TypeError, match=f"an optax transformation{BEATS}"):
        sg.freeze(optax.adam, "a")
