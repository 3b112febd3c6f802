"""One step, many layouts: all agree with one device, and nothing is reduced twice.

What differs is the order in which float32 numbers are added: of 16 examples or 8
features, so a few units in the last place (6e-8) of each sum. adamw divides a gradient
by its own size, which keeps relative errors as they are; over 20 steps they add up to
less than 20 * 16 units, 2e-5.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
RTOL = 2e-5
RNG = np.random.default_rng(2)
X = np.asarray(RNG.normal(size=(16, 8)), np.float32)
Y = np.asarray(RNG.normal(size=(16, 8)), np.float32)
ADAMW = optax.adamw(1e-2, weight_decay=0.1)


def params():
    rng = np.random.default_rng(3)
    normal = lambda *shape: np.asarray(rng.normal(size=shape) / 3, np.float32)
    return {"w1": normal(8, 16), "b1": normal(16), "w2": normal(16, 8)}


def plain(h, axis):
    return h


def clipped(h, axis):
    """The norm is that of the whole cotangent, about 0.3 at first."""
    return sg.clip_gradient_norm(h, 0.05, axis_name=axis)


def scaled(h, axis):
    return sg.scale_gradient(h, 0.5)


GATES = {"no gate": plain, "clip_gradient_norm": clipped, "scale_gradient": scaled}


def loss_of(gate, axis=None):
    def loss(p, batch):
        x, y = batch
        h = gate(jnp.tanh(x @ p["w1"] + p["b1"][None]), axis)
        local = jnp.mean((h @ p["w2"] - y) ** 2)
        return jax.lax.pmean(local, axis) if axis else local

    return loss


def mesh(*sizes, explicit=False):
    names = ("data", "model")[: len(sizes)]
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


TENSOR = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model")}
LAYOUTS = {
    "data": ((8,), {}, P("data")),
    "tensor": ((1, 8), TENSOR, P()),
    "fsdp": ((8,), {"w1": P("data"), "b1": P("data"), "w2": P("data")}, P("data")),
    "data x tensor": ((2, 4), TENSOR, P("data")),
}


def placed(layout):
    sizes, specs, batch = LAYOUTS[layout]
    m = mesh(*sizes)
    put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))
    p = {k: put(x, specs.get(k, P())) for k, x in params().items()}
    return p, (put(X, batch), put(Y, batch))


def run(step, p, batch, steps=20):
    state, losses = step.init(p), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state, np.array(losses)


@functools.cache
def one_device(gate):
    """Losses, the first gradient, and the parameters after 20 steps, by hand."""
    p, loss = params(), loss_of(GATES[gate])
    state, losses = ADAMW.init(p), []
    first = jax.grad(loss)(p, (X, Y))
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    for _ in range(20):
        value, grads = value_and_grad(p, (X, Y))
        updates, state = ADAMW.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        losses.append(value)
    return np.array(losses), first, p


def assert_agrees(gate, losses, state):
    expected, _, p = one_device(gate)
    np.testing.assert_allclose(losses, expected, rtol=RTOL)
    for name, x in state.params.items():
        scale = np.abs(p[name]).max()
        np.testing.assert_allclose(x, p[name], rtol=RTOL, atol=RTOL * scale)


def assert_compiled_once(step):
    (program,) = step._programs.values()
    assert program._cache_size() <= 1  # 0: after thousands of tests JAX forgets some


def gradients_by_sgd(loss, p, batch):
    """A step of rate 1: a gradient that was added N times would show N times."""
    step = make_step(loss, optax.sgd(1.0))
    state, _ = step(step.init(p), batch)
    return {k: np.array(p[k]) - np.array(state.params[k]) for k in p}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_one_device(layout, gate):
    p, batch = placed(layout)
    loss = loss_of(GATES[gate])
    step = make_step(loss, ADAMW)
    state, losses = run(step, p, batch)
    assert_agrees(gate, losses, state)
    ours, (_, first, _) = gradients_by_sgd(loss, p, batch), one_device(gate)
    for name, g in ours.items():  # a difference of parameters: their rounding
        np.testing.assert_allclose(g, first[name], rtol=RTOL, atol=2e-7)
    # Arrays stay where they were, moments beside their parameters.
    for name, x in p.items():
        for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
            assert tree[name].sharding.is_equivalent_to(x.sharding, x.ndim)
    assert_compiled_once(step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fit_keeps_layouts_and_agrees(layout):
    p, (x, y) = placed(layout)
    stack = lambda x: jnp.stack([x] * 20)
    step = make_step(loss_of(clipped), ADAMW)
    for batches in ((stack(x), stack(y)), lambda n: (x, y), [(x, y)] * 20):
        state, history = fit(
            step, step.init(p), batches, steps=20, log_every=8, progress=False
        )
        assert_agrees("clip_gradient_norm", history["loss"], state)
        for name, old in p.items():
            for tree in (state.params, state.opt_state[0].mu):
                assert tree[name].sharding.is_equivalent_to(old.sharding, old.ndim)


def test_parameters_on_one_device_follow_the_batch():
    """Nobody said where they lie: a copy on each device, from the first step on."""
    _, batch = placed("data")
    step = make_step(loss_of(plain), ADAMW)
    state, losses = run(step, params(), batch)
    assert_agrees("no gate", losses, state)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert len(state.params["w1"].sharding.device_set) == 8
    assert_compiled_once(step)


def test_frozen_leaves_stay_where_they_are():
    p, batch = placed("fsdp")
    step = make_step(loss_of(plain), ADAMW, frozen="w1")
    state, _ = run(step, p, batch, 3)
    assert state.params["w1"] is p["w1"]
    state, _ = fit(step, step.init(p), lambda n: batch, steps=3, progress=False)
    assert state.params["w1"] is p["w1"]


def test_shardings_in_types():
    """Explicit axes: the layout is a part of the type, and is kept as well."""
    m = mesh(8, explicit=True)
    with jax.set_mesh(m):
        put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))
        p = {k: put(x, P()) for k, x in params().items()}
        batch = (put(X, P("data")), put(Y, P("data")))
        step = make_step(loss_of(plain), ADAMW)
        state, losses = run(step, p, batch)
        assert_agrees("no gate", losses, state)
        state, history = fit(
            step, step.init(p), lambda n: batch, steps=20, progress=False
        )
        assert_agrees("no gate", history["loss"], state)


@pytest.mark.parametrize("gate", GATES)
def test_in_shard_map(gate):
    """Parameters replicated, a part of the batch on each device."""
    m = mesh(8)
    step = make_step(loss_of(GATES[gate], "data"), ADAMW)
    sharded = jax.jit(
        jax.shard_map(
            step, mesh=m, in_specs=(P(), P("data")), out_specs=P(), check_vma=True
        )
    )
    state, losses = step.init(params()), []
    for _ in range(20):
        state, metrics = sharded(state, (X, Y))
        losses.append(metrics["loss"])
    assert_agrees(gate, np.array(losses), state)
    # The same in chunks of steps
    state, history = fit(
        sharded, step.init(params()), lambda n: (X, Y), steps=20, progress=False
    )
    assert_agrees(gate, history["loss"], state)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"nonfinite": "skip"},
        {"stats": "p/w1"},
        {"accumulate": 2, "nonfinite": "report", "stats": ["p/w1", "p/b1"]},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_option_on_many_devices(options):
    """With shardings in types, and in shard_map; sizes are of the whole gradient."""
    m = mesh(8, explicit=True)
    put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))
    p = {k: put(x, P()) for k, x in params().items()}
    batch = (put(X, P("data")), put(Y, P("data")))
    step = make_step(loss_of(plain), ADAMW, **options)
    with jax.set_mesh(m):
        state, losses = run(step, p, batch)
        _, metrics = step(step.init(p), batch)
    assert_agrees("no gate", losses, state)
    mapped = make_step(loss_of(plain, "data"), ADAMW, **options)
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh(8), **specs))
    state, losses = mapped.init(params()), []
    for _ in range(20):
        state, found = sharded(state, (X, Y))
        losses.append(found["loss"])
    assert_agrees("no gate", np.array(losses), state)
    if options.get("stats") == "p/w1":
        norm = jnp.linalg.norm(one_device("no gate")[1]["w1"])
        np.testing.assert_allclose(metrics["stats"]["p/w1"].norm, norm, rtol=RTOL)
        first = sharded(mapped.init(params()), (X, Y))[1]["stats"]["p/w1"].norm
        np.testing.assert_allclose(first, norm, rtol=RTOL)


def test_a_shard_map_that_would_not_add_gradients_up():
    step = make_step(loss_of(plain, "data"), ADAMW)
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
    sharded = jax.jit(jax.shard_map(step, mesh=mesh(8), **specs))
    with pytest.raises(ValueError, match=r'adds[\s\S]*over "data"[\s\S]*=True'):
        sharded(step.init(params()), (X, Y))


def test_all_shards_skip_the_same_steps():
    """Each device has its own parameters here, and one of them a nan."""
    m = mesh(8)
    fun = lambda w, x: jnp.sum(w * x)
    step = make_step(fun, optax.sgd(0.1, momentum=0.9), nonfinite="skip")

    def part(w, x):
        state, metrics = step(step.init(w), x)
        return state.params, state.step, metrics["nonfinite"]

    sharded = jax.jit(
        jax.shard_map(
            part, mesh=m, in_specs=(P("data"),) * 2, out_specs=(P("data"), P(), P())
        )
    )
    w, x = np.ones(8, np.float32), np.arange(8, dtype=np.float32)
    after, _, found = sharded(w, x)
    np.testing.assert_allclose(after, 1 - 0.1 * x, rtol=1e-6)
    assert found == {"w": False}
    x[3] = np.nan
    after, count, found = sharded(w, x)
    np.testing.assert_array_equal(after, w)
    assert found == {"w": True}
    assert count == 1


def collectives(lowered):
    """Count what is sent between devices, by its kind."""
    text = lowered.compile().as_text()
    kinds = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    found = re.findall(rf" {kinds}(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def reduced_bytes(lowered):
    """Add up the sizes of what is reduced over devices."""
    text, total = lowered.compile().as_text(), 0
    for types in re.findall(r"= (.*) all-reduce(?:-start)?\(", text):
        for shape in re.findall(r"f32\[([\d,]*)\]", types):
            total += 4 * int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


def by_hand(layout, loss, accumulate=1):
    p, batch = placed(layout)
    state = ADAMW.init(p)

    def step(p, state, batch):
        if accumulate == 1:
            value, grads = jax.value_and_grad(loss)(p, batch)
        else:
            split = lambda x: x.reshape(-1, accumulate, *x.shape[1:])
            micro = jax.tree.map(split, batch)

            def add(sums, i):
                pick = lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
                out = jax.value_and_grad(loss)(p, jax.tree.map(pick, micro))
                return jax.tree.map(jnp.add, sums, out), None

            zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), p))
            sums, _ = jax.lax.scan(add, zeros, jnp.arange(accumulate))
            value, grads = jax.tree.map(lambda x: x / accumulate, sums)
        updates, new = ADAMW.update(grads, state, p)
        return optax.apply_updates(p, updates), new, value

    kept = jax.tree.map(
        lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else None,
        (p, state),
    )
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, None))
    return jitted.lower(p, state, batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_sent_that_would_not_be_by_hand(layout, accumulate):
    loss = loss_of(plain)
    p, batch = placed(layout)
    step = make_step(loss, ADAMW, accumulate=accumulate)
    ours = step.lower(step.init(p), batch)
    theirs = by_hand(layout, loss, accumulate)
    assert collectives(ours) == collectives(theirs)
    assert reduced_bytes(ours) <= reduced_bytes(theirs)


def test_each_gradient_is_reduced_once():
    """Data parallel: the bytes of all gradients and of the loss, no more."""
    p, batch = placed("data")
    step = make_step(loss_of(plain), ADAMW)
    total = sum(x.nbytes for x in p.values()) + 4
    assert reduced_bytes(step.lower(step.init(p), batch)) == total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_of_sharded_examples(layout):
    p, batch = placed(layout)
    step = make_step(loss_of(plain), ADAMW, accumulate=2)
    state, losses = run(step, p, batch)
    assert_agrees("no gate", losses, state)
