"""A training step: what trains, what does not, and what is handed on."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32

import stopgrad_jax as sg
from stopgrad_jax.train import State, fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=8), jnp.float32)
BATCH = (X, Y)


def params():
    w = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    return {"encoder": jnp.asarray(w), "head": f32(1.0, -1.0, 0.5, 2.0)}


def loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["encoder"]) @ p["head"] - y) ** 2)


def assert_same_bits(a, b):
    a, b = np.array(a), np.array(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def by_hand(optimizer, steps, p, fun=loss, batch=BATCH):
    """Train all leaves as optax's documentation does."""
    state = optimizer.init(p)

    @jax.jit
    def step(p, state):
        value, grads = jax.value_and_grad(fun)(p, batch)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    losses = []
    for _ in range(steps):
        p, state, value = step(p, state)
        losses.append(value)
    return p, state, losses


def run(step, state, steps, batch=BATCH):
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state, losses


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 20)),
    "MultiSteps": optax.MultiSteps(optax.adamw(1e-2), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_optax(name):
    optimizer = OPTIMIZERS[name]
    expected, opt_state, losses = by_hand(optimizer, 5, params())
    step = make_step(loss, optimizer)
    state, ours = run(step, step.init(params()), 5)
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
        (state.params, state.opt_state),
        (expected, opt_state),
    )
    assert (state.step, state.step.dtype) == (5, jnp.int32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_trains_goes_as_if_the_frozen_were_constants(name):
    optimizer, p = OPTIMIZERS[name], params()
    alone = lambda q, batch: loss({**p, **q}, batch)
    head = {"head": p["head"]}
    expected, opt_state, losses = by_hand(optimizer, 5, head, alone)
    step = make_step(loss, optimizer, frozen="encoder")
    state, ours = run(step, step.init(p), 5)
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    np.testing.assert_allclose(state.params["head"], expected["head"], rtol=2e-6)
    assert state.params["encoder"] is p["encoder"]
    sizes = lambda tree: sorted(x.size for x in jax.tree.leaves(tree))
    assert sizes(state.opt_state) == sizes(opt_state)
    # The state is that of sg.freeze, for whoever goes on without the step.
    same = step.optimizer.init(p)
    assert jax.tree.structure(same) == jax.tree.structure(state.opt_state)


def test_frozen_leaves_are_bit_identical_after_a_thousand_steps():
    p = params()
    special = f32(-0.0, np.inf, np.nan, 1e-40, 3.0)
    p["encoder"] = {"w": p["encoder"], "special": special, "n": jnp.arange(3)}
    before = jax.tree.map(np.array, p["encoder"])
    fun = lambda p, batch: loss({**p, "encoder": p["encoder"]["w"]}, batch)
    step = make_step(fun, optax.adamw(1e-2, weight_decay=0.1), frozen="encoder")
    state, history = fit(
        step, step.init(p), lambda n: BATCH, steps=1000, progress=False
    )
    jax.tree.map(assert_same_bits, state.params["encoder"], before)
    assert state.params["encoder"]["w"] is p["encoder"]["w"]
    assert history["loss"][-1] < history["loss"][0] / 2


def test_every_kind_of_leaf_and_of_selection():
    p = {
        **params(),
        "act": jnp.tanh,
        "name": "model",
        "depth": 2,
        "none": None,
        "ids": jnp.arange(3),
        "key": jax.random.key(0),
        "rate": 0.5,
    }

    def fun(p, batch):
        assert p["name"] == "model"
        x = batch[0]
        for _ in range(p["depth"]):  # a Python int
            x = p["act"](x)
        noise = jax.random.normal(p["key"]) * 0
        return jnp.mean((x @ p["encoder"]) @ p["head"]) ** 2 * p["rate"] + noise

    for frozen in (
        ["encoder", "rate"],
        "!head",
        lambda path, leaf: path != "head",
        {"head": False} | {k: True for k in p if k != "head"},
    ):
        step = make_step(fun, optax.adam(1e-2), frozen=frozen)
        state, _ = step(step.init(p), BATCH)
        assert not jnp.array_equal(state.params["head"], p["head"])
        for name in p.keys() - {"head"}:
            assert state.params[name] is p[name], name
    everything = make_step(fun, optax.adam(1e-2))
    state, _ = run(everything, everything.init(p), 2)
    assert state.params["rate"] != 0.5
    assert state.params["depth"] == 2


def test_aux_and_key_reach_the_loss():
    def fun(w, batch, key):
        noise = jax.random.normal(key)
        return (w - 3.0) ** 2 + 0 * noise, {"noise": noise, "size": batch.shape[0]}

    step = make_step(fun, optax.sgd(0.1), has_aux=True)
    key = jax.random.key(1)
    state, metrics = step(step.init(1.0), jnp.ones(4), key)
    assert metrics["loss"] == 4.0
    assert metrics["aux"]["noise"] == jax.random.normal(key)
    assert metrics["aux"]["size"] == 4
    np.testing.assert_allclose(state.params, 1.4, rtol=1e-6)  # 1 - 0.1 * 2 * (1 - 3)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_micro_batches_add_up_to_the_batch(k):
    """A mean of means of equal size is the mean; the rest is rounding."""
    big = make_step(loss, optax.sgd(0.1), frozen="encoder")
    small = make_step(loss, optax.sgd(0.1), frozen="encoder", accumulate=k)
    one, losses = run(big, big.init(params()), 3)
    many, ours = run(small, small.init(params()), 3)
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    np.testing.assert_allclose(many.params["head"], one.params["head"], rtol=1e-5)


def test_a_nonlinear_gate_sees_its_micro_batch():
    """By hand: the gradient of mean(w * x) by w is mean(x)."""
    x = f32(1.0, 9.0, 3.0, 11.0)  # micro-batches (1, 3) and (9, 11): means 2 and 10
    clipped = lambda w, x: jnp.mean(sg.clip_gradient_norm(w, 3.0) * x)
    after = {}
    for k in (1, 2):
        step = make_step(clipped, optax.sgd(1.0), accumulate=k)
        after[k] = step(step.init(0.0), x)[0].params
    np.testing.assert_allclose(after[1], -3.0, rtol=1e-6)  # 6 is clipped to 3
    np.testing.assert_allclose(after[2], -(2.0 + 3.0) / 2, rtol=1e-6)  # 10 is clipped
    linear = lambda w, x: jnp.mean(sg.scale_gradient(w, 0.5) * x)
    for k in (1, 2):
        step = make_step(linear, optax.sgd(1.0), accumulate=k)
        np.testing.assert_allclose(step(step.init(0.0), x)[0].params, -3.0, rtol=1e-6)


def test_micro_batches_have_their_own_keys_and_aux():
    fun = lambda w, x, key: (jnp.mean(w * x), jax.random.key_data(key))
    step = make_step(fun, optax.sgd(1.0), has_aux=True, accumulate=3)
    key = jax.random.key(7)
    _, metrics = step(step.init(1.0), jnp.ones(6), key)
    expected = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3)]
    np.testing.assert_array_equal(metrics["aux"], expected)


def test_narrow_gradients_are_added_in_float32():
    """256 micro-batches of gradient 1: in bfloat16 a sum would stop at 256."""
    fun = lambda w, x: jnp.mean(w * x)
    step = make_step(fun, optax.sgd(1.0), accumulate=512)
    state, _ = step(step.init(jnp.bfloat16(0.0)), jnp.ones(512, jnp.bfloat16))
    assert (state.params, state.params.dtype) == (-1.0, jnp.bfloat16)


def test_complex_leaves_descend():
    target = jnp.complex64(1.0 + 2.0j)
    fun = lambda z, batch: jnp.abs(z - target) ** 2
    step = make_step(fun, optax.sgd(0.25))
    state, losses = run(step, step.init(jnp.complex64(0.0)), 30, None)
    np.testing.assert_allclose(state.params, target, rtol=1e-5)
    assert losses[-1] < 1e-6


def test_the_users_arrays_live_and_the_old_state_is_donated():
    p = params()
    step = make_step(loss, optax.adam(1e-2), frozen="encoder")
    first = step.init(p)
    second, _ = step(first, BATCH)
    third, _ = step(second, BATCH)
    assert not any(x.is_deleted() for x in jax.tree.leaves((p, BATCH, third)))
    assert second.params["encoder"] is first.params["encoder"] is p["encoder"]
    for old in (first, second):
        assert old.params["head"].is_deleted()
        assert all(x.is_deleted() for x in jax.tree.leaves(old.opt_state))
        with pytest.raises(RuntimeError, match=r"used up[\s\S]*got: [\s\S]*write: "):
            step(old, BATCH)
    keep = make_step(loss, optax.adam(1e-2), donate=False)
    first = keep.init(p)
    keep(first, BATCH)
    keep(first, BATCH)


def test_an_optimizer_that_holds_arrays_can_begin_again():
    rate = jnp.float32(0.1)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    step = make_step(loss, optimizer)
    for _ in range(2):
        run(step, step.init(params()), 2)
    assert rate == jnp.float32(0.1)
    # A state that holds the parameters themselves:
    step = make_step(loss, optax.chain(optax.sgd(0.1), optax.ema(0.9)))
    run(step, step.init(params()), 2)


def test_a_step_is_traced_in_the_first_call_alone():
    traces = []

    def fun(p, batch):
        traces.append(1)
        return loss(p, batch) * p["scale"]

    for optimizer in OPTIMIZERS.values():
        step = make_step(fun, optimizer, frozen="encoder")
        state = step.init({**params(), "scale": 2.0})  # a weak type
        traces.clear()
        run(step, state, 3)
        assert len(traces) == 2  # for its gradient, and to see what it trains
        step = make_step(fun, optimizer, frozen="encoder", untrained="ignore")
        traces.clear()
        run(step, step.init({**params(), "scale": 2.0}), 3)
        assert len(traces) == 1


def test_under_the_transformations_of_jax():
    step = make_step(loss, optax.adamw(1e-2), frozen="encoder", nonfinite="skip")
    p = params()
    looped, losses = run(step, step.init(p), 4)
    # scan, eager and in a jit
    scan = lambda s: jax.lax.scan(lambda s, _: step(s, BATCH), s, None, length=4)
    for wrap in (lambda f: f, jax.jit):
        state, metrics = wrap(scan)(step.init(p))
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
        np.testing.assert_allclose(
            state.params["head"], looped.params["head"], rtol=1e-6
        )

    # init inside too: a whole training as one function, for two learning problems
    def train(head):
        state = step.init({**p, "head": head})
        for _ in range(4):
            state, _ = step(state, BATCH)
        return state.params["head"]

    heads = jnp.stack([p["head"], 2 * p["head"]])
    both = jax.jit(jax.vmap(train))(heads)
    np.testing.assert_allclose(both[0], looped.params["head"], rtol=1e-6)
    np.testing.assert_allclose(both, jax.vmap(train)(heads), rtol=1e-6)
    assert not heads.is_deleted()

    # a hyperparameter differentiated through a step
    def after(rate):
        inner = make_step(loss, optax.sgd(rate))
        return loss(inner(inner.init(p), BATCH)[0].params, BATCH)

    slope = (after(0.1 + 1e-2) - after(0.1 - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(after)(0.1), slope, rtol=1e-2)


def test_freezing_and_thawing_in_mid_training():
    p, optimizer = params(), optax.adamw(1e-2, weight_decay=0.1)
    head_only = make_step(loss, optimizer, frozen="encoder")
    both = make_step(loss, optimizer)
    warm, _ = run(head_only, head_only.init(p), 5)
    moments = np.array(warm.opt_state[0].mu["head"])
    thawed = both.migrate(warm, head_only)
    assert thawed.step == 5
    np.testing.assert_array_equal(thawed.opt_state[0].mu["head"], moments)
    np.testing.assert_array_equal(thawed.opt_state[0].mu["encoder"], 0)
    assert_same_bits(thawed.params["encoder"], p["encoder"])
    on, _ = run(both, thawed, 5)
    assert not jnp.array_equal(on.params["encoder"], p["encoder"])
    assert not p["encoder"].is_deleted()
    # and frozen again, where momentum alone would move it
    again = head_only.migrate(on, both)
    still = np.array(again.params["encoder"])
    end, _ = run(head_only, again, 5)
    assert_same_bits(end.params["encoder"], still)
    assert end.step == 15


def test_optimizers_that_ask_for_the_loss():
    optimizer, p = optax.lbfgs(), params()
    head, fun = p["head"], lambda head: loss({**p, "head": head}, BATCH)
    state, expected = optimizer.init(head), []
    for _ in range(3):
        value, grad = jax.value_and_grad(fun)(head)
        expected.append(value)
        more = {"value": value, "grad": grad, "value_fn": fun}
        updates, state = optimizer.update(grad, state, head, **more)
        head = optax.apply_updates(head, updates)
    for k in (1, 2):
        step = make_step(loss, optimizer, frozen="encoder", accumulate=k)
        _, losses = run(step, step.init(p), 3)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[2] < losses[0] / 2
    plateau = optax.chain(
        optax.sgd(0.0), optax.contrib.reduce_on_plateau(patience=2, factor=0.5)
    )
    step = make_step(loss, plateau)
    state, _ = run(step, step.init(p), 8)
    assert state.opt_state[1].scale < 1


def test_a_state_is_saved_and_goes_on_bit_for_bit(tmp_path):
    step = make_step(loss, optax.adamw(1e-2), frozen="encoder")
    half, _ = run(step, step.init(params()), 3)
    saved = pickle.dumps(jax.device_get(half))
    whole, _ = run(step, half, 3)
    restored, _ = run(step, pickle.loads(saved), 3)
    jax.tree.map(assert_same_bits, restored, whole)
    assert isinstance(restored, State)
    assert restored.replace(step=0).step == 0


def test_a_state_is_saved_by_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    step = make_step(loss, optax.adamw(1e-2), frozen="encoder")
    half, _ = run(step, step.init(params()), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half)
    whole, _ = run(step, half, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        like = step.init(params())
        restored = checkpointer.restore(tmp_path / "state", like)
    ours, _ = run(step, restored, 3)
    jax.tree.map(assert_same_bits, ours, whole)


def test_a_teacher_is_an_average_of_its_student():
    """A frozen leaf that the user's own step changes, by either rule of optax."""
    student = params()
    everything = {"student": student, "teacher": student}  # one array, two places

    def distance(p, batch):
        x, _ = batch
        out = lambda q: jnp.tanh(x @ q["encoder"]) @ q["head"]
        return jnp.mean((out(p["student"]) - out(p["teacher"]) - 1.0) ** 2)

    inner = make_step(distance, optax.sgd(0.1), frozen="teacher")

    def averaged(state, batch):
        state, metrics = inner(state, batch)
        p = state.params
        teacher = optax.incremental_update(p["student"], p["teacher"], 0.25)
        return state.replace(params={**p, "teacher": teacher}), metrics

    def periodic(state, batch):
        state, metrics = inner(state, batch)
        p = state.params
        teacher = optax.periodic_update(p["student"], p["teacher"], state.step, 2)
        return state.replace(params={**p, "teacher": teacher}), metrics

    for outer in (averaged, periodic):
        expected = student
        for jitted in (outer, jax.jit(outer)):
            state = inner.init(everything)
            expected = student["head"]
            for n in range(1, 5):
                state, _ = jitted(state, BATCH)
                now = state.params["student"]["head"]
                if outer is averaged:
                    expected = 0.25 * now + 0.75 * expected
                elif n % 2 == 0:
                    expected = np.array(now)
                teacher = state.params["teacher"]["head"]
                np.testing.assert_allclose(teacher, expected, rtol=1e-6)
        looped, _ = fit(
            outer, inner.init(everything), lambda n: BATCH, steps=4, progress=False
        )
        np.testing.assert_allclose(
            looped.params["teacher"]["head"], expected, rtol=1e-6
        )
    assert not any(x.is_deleted() for x in jax.tree.leaves(student))
    # Set equal by hand, the student's own array is the teacher's: still no conflict.
    state, _ = inner(inner.init(everything), BATCH)
    state = state.replace(params={**state.params, "teacher": state.params["student"]})
    after, _ = inner(state, BATCH)
    assert not after.params["teacher"]["head"].is_deleted()
