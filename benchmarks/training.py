"""(i) Training steps: `make_step` and `fit` against loops by hand and other libraries.

One network (two layers, adam) on random digits-sized data; and the article's
experiments A and B. Loops of flax, torch and TensorFlow run where those are installed.
"""

import functools
import importlib.util
import re
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
from measure import repeated, seconds, side_by_side

import stopgrad_jax as sg

WIDTH, BATCH, CHUNK = 64, 32, 200
DEVICES = (1, 2, 4, 8)


def parameters(width=WIDTH):
    """Weights of the two layers."""
    rng = np.random.RandomState(0)
    draw = lambda *shape: jnp.asarray(rng.randn(*shape) / 8, jnp.float32)
    return {"a": {"w": draw(64, width)}, "b": {"w": draw(width, 10)}}


def batches(count=CHUNK, size=BATCH):
    """Images and labels, a leading axis of batches."""
    rng = np.random.RandomState(1)
    x = jnp.asarray(rng.rand(count, size, 64), jnp.float32)
    return x, jnp.asarray(rng.randint(0, 10, (count, size)))


def loss(params, batch):
    """Cross entropy."""
    x, labels = batch
    hidden = sg.name(jax.nn.relu(x @ params["a"]["w"]), "hidden")
    logits = hidden @ params["b"]["w"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_hand(optimizer):
    """Write the step as one does without us."""

    def step(state, batch):
        params, opt_state, count = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), value

    return step


def start_by_hand(optimizer):
    """Return fresh arrays, which the loop may donate."""
    params = jax.tree.map(jnp.copy, parameters())
    return params, optimizer.init(params), jnp.int32(0)


def steps():
    """One jitted step, called again and again, and whole chunks as one scan."""
    optimizer, data = optax.adam(1e-3), batches()
    batch = jax.tree.map(lambda x: x[0], data)
    step = sg.train.make_step(loss, optimizer)
    hand = jax.jit(by_hand(optimizer), donate_argnums=0)

    def run(call, start):
        state = [start]

        def once():
            for _ in range(CHUNK):
                state[0], _ = call(state[0], batch)
            return state[0]

        return once

    ours = run(step, step.init(parameters()))
    row = side_by_side(ours, run(hand, start_by_hand(optimizer)), rounds=15)
    yield "i. jitted step against by hand", _rates(row)

    reported = sg.train.make_step(loss, optimizer, stats=["hidden", "params"])
    row = side_by_side(run(reported, reported.init(parameters())), ours, rounds=9)
    yield "i. step with stats against without", _rates(row)

    yield "i. fit's scan against by hand", _rates(_scans(step, optimizer, data))


def _scans(step, optimizer, data, chunks=10):
    """`fit` of ten chunks, metrics fetched, against the scan that one writes."""
    many = jax.tree.map(lambda x: jnp.concatenate([x] * chunks), data)
    scanned = jax.jit(
        lambda state, xs: jax.lax.scan(by_hand(optimizer), state, xs), donate_argnums=0
    )

    def hand():
        state, values = start_by_hand(optimizer), []
        for k in range(chunks):
            part = slice(k * CHUNK, (k + 1) * CHUNK)
            chunk = tuple(x[part] for x in many)
            state, losses = scanned(state, chunk)
            values.append(np.asarray(losses))
        return state

    def ours():
        state = step.init(parameters())
        same = {"log_every": CHUNK, "progress": False}
        return sg.train.fit(step, state, many, steps=CHUNK * chunks, **same)[0]

    row = side_by_side(ours, hand, rounds=15)
    return {**row, "ours": row["ours"] / chunks, "theirs": row["theirs"] / chunks}


def _rates(row):
    return {
        "ours_steps_per_second": CHUNK / row["ours"],
        "theirs": CHUNK / row["theirs"],
        "time_ratio": row["ratio"],
    }


# Other libraries ------------------------------------------------------------------


def others():
    """The usual loops of flax, torch and TensorFlow, step by step."""
    step = sg.train.make_step(loss, optax.adam(1e-3))
    batch = jax.tree.map(lambda x: x[0], batches())
    state = [step.init(parameters())]

    def ours():
        for _ in range(CHUNK):
            state[0], _ = step(state[0], batch)
        return state[0]

    for name, make in {
        "flax": flax_loop,
        "tensorflow": tensorflow_loop,
        "torch": torch_loop,
    }.items():
        if importlib.util.find_spec(name):
            row = side_by_side(ours, make(), rounds=5)
            yield f"i. jitted step against {name}", _rates(row)


def flax_loop():
    """Flax's nnx: a model, an optimizer, `nnx.jit`."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Linear(64, WIDTH, use_bias=False, rngs=rngs)
            self.b = nnx.Linear(WIDTH, 10, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.b(jax.nn.relu(self.a(x)))

    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    x, labels = jax.tree.map(lambda x: x[0], batches())

    @nnx.jit
    def step(model, optimizer, x, labels):
        def objective(model):
            entropy = optax.softmax_cross_entropy_with_integer_labels
            return entropy(model(x), labels).mean()

        value, grads = nnx.value_and_grad(objective)(model)
        optimizer.update(model, grads)
        return value

    return repeated(step, model, optimizer, x, labels, times=CHUNK)


def tensorflow_loop():
    """Run keras's optimizer in a `tf.function`."""
    import tensorflow as tf

    weights = [tf.Variable(np.asarray(x)) for x in jax.tree.leaves(parameters())]
    optimizer = tf.keras.optimizers.Adam(1e-3)
    x, labels = (tf.constant(np.asarray(x[0])) for x in batches())

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = tf.nn.relu(x @ weights[0]) @ weights[1]
            entropy = tf.nn.sparse_softmax_cross_entropy_with_logits
            value = tf.reduce_mean(entropy(labels, logits))
        optimizer.apply_gradients(
            zip(tape.gradient(value, weights), weights, strict=True)
        )
        return value

    return lambda: [step() for _ in range(CHUNK)][-1].numpy()


def torch_loop():
    """Write torch's usual loop."""
    import torch

    torch.set_num_threads(1)  # with two they wait for each other
    weights = [
        torch.nn.Parameter(torch.tensor(np.asarray(x)))
        for x in jax.tree.leaves(parameters())
    ]
    optimizer = torch.optim.Adam(weights, 1e-3)
    x, labels = (torch.tensor(np.asarray(x[0])) for x in batches())
    labels = labels.long()

    def loop():
        for _ in range(CHUNK):
            optimizer.zero_grad()
            logits = torch.relu(x @ weights[0]) @ weights[1]
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        return weights[0].detach().numpy()

    return loop


# The article ------------------------------------------------------------------------


def experiments(times=1000):
    """A and B as `fit` runs them, against TensorFlow's session where installed."""
    xs, ys = map(jnp.asarray, programs.data())
    index = lambda number: (xs[number % 32], ys[number % 32])
    start = {"w": jnp.float32(2), "b": jnp.float32(1)}
    line = lambda p, point: programs.loss(p["w"], p["b"], *point)
    step = sg.train.make_step(line, optax.sgd(0.01))

    def update(p, point):
        value, grads = sg.value_and_gradients(line, "p")(p, point)
        return jax.tree.map(lambda p, g: p - 0.01 * g, p, grads), {"loss": value}

    count = 32 * times
    fitted = functools.partial(sg.train.fit, steps=count, progress=False)
    ours = {
        "A": lambda: fitted(step, step.init(start), index, log_every=count)[0],
        "B": lambda: fitted(update, start, index, log_every=count)[0],
    }
    theirs = {}
    if importlib.util.find_spec("tensorflow"):
        theirs = programs.tensorflow_training()
    for experiment, run in ours.items():
        run()
        rate = count / min(seconds(run) for _ in range(5))
        row = {"steps_per_second": rate}
        name = f"TensorFlow session, experiment {experiment}"
        if name in theirs:
            loop, length = theirs[name]
            loop()
            session = length / min(seconds(loop) for _ in range(5))
            row |= {"session": session, "times": rate / session}
        yield f"i. experiment {experiment}, fit", row


# Many devices, and memory -------------------------------------------------------------


def devices():
    """Data parallel over virtual devices: time, and the collectives of one step."""
    for count in DEVICES:
        yield f"i. data parallel, {count} devices", _measured("devices", count)


def memory():
    """Resident memory of a model with nine parts of ten frozen, and with none."""
    for frozen in ("frozen", "all"):
        yield f"i. memory, {frozen}", _measured("memory", frozen)


def _measured(*what):
    """Measure in a process of its own: devices and peaks belong to processes."""
    command = [sys.executable, __file__, *map(str, what)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if out.returncode:
        raise RuntimeError(out.stderr)
    return dict(
        (key, float(value))
        for key, value in (line.split("=") for line in out.stdout.split())
    )


def _devices(count):
    jax.config.update("jax_num_cpu_devices", count)
    sharding = jax.sharding
    auto = (sharding.AxisType.Auto,)
    mesh = jax.make_mesh((count,), ("data",), axis_types=auto)
    whole = sharding.NamedSharding(mesh, sharding.PartitionSpec())
    split = sharding.NamedSharding(mesh, sharding.PartitionSpec("data"))
    step = sg.train.make_step(loss, optax.adam(1e-3))
    state = step.init(jax.device_put(parameters(256), whole))
    batch = jax.tree.map(lambda x: x[0], batches(1, 512))
    batch = jax.device_put(batch, split)
    text = step.lower(state, batch).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    states = [state]

    def run():
        for _ in range(50):
            states[0], _ = step(states[0], batch)
        return states[0]

    run()
    print(f"steps_per_second={50 / min(seconds(run) for _ in range(5))}")
    print(f"collectives={len(re.findall(rf' (?:{kinds})(?:-start)?[(]', text))}")


def _memory(frozen):
    def objective(params, x):
        for k in range(10):
            x = jnp.tanh(x @ params[f"layer{k}"])
        return jnp.mean(x**2)

    width = 1024
    params = {f"layer{k}": jnp.ones((width, width)) / width for k in range(10)}
    where = [f"layer{k}" for k in range(9)] if frozen == "frozen" else None
    step = sg.train.make_step(objective, optax.adamw(1e-3), frozen=where)
    state, x = step.init(params), jnp.ones((8, width))
    del params
    for _ in range(3):
        state, _ = jax.block_until_ready(step(state, x))
    held = sum(x.nbytes for x in jax.live_arrays()) / 2**20
    analysis = step.lower(state, x).compile().memory_analysis()
    print(f"live_MiB={held}")
    print(f"temporary_MiB={analysis.temp_size_in_bytes / 2**20}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak_resident_MiB={peak}")


def rows():
    """All of it."""
    for part in (steps, others, experiments, devices, memory):
        yield from part()


if __name__ == "__main__":
    if sys.argv[1:]:
        measure = {"devices": lambda n: _devices(int(n)), "memory": _memory}
        measure[sys.argv[1]](sys.argv[2])
    else:
        for name, row in rows():
            print(f"{name:44}", {k: float(f"{v:.3g}") for k, v in row.items()})
