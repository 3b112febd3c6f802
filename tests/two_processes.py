"""One of two processes that train together: run by test_train_processes.py.

Arguments: the coordinator's port, this process's number, after how many steps it dies
(0: it does not), and whether the steps run in `fit`. Prints its losses and parameters.
"""

import json
import os
import sys

import jax
import numpy as np

STEPS, RATE, DECAY = 20, 1e-2, 0.1


def data():
    """Sixteen examples, of which each process trains on its half."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(16, 4)), rng.normal(size=16)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def params():
    """Two layers."""
    rng = np.random.default_rng(6)
    normal = lambda *shape: np.asarray(rng.normal(size=shape) / 2, np.float32)
    return {"w1": normal(4, 8), "w2": normal(8)}


def loss(p, batch):
    """A mean over the batch, with a gate inside."""
    import stopgrad_jax as sg

    x, y = batch
    h = sg.clip_gradient_norm(jax.numpy.tanh(x @ p["w1"]), 0.1)
    return jax.numpy.mean((h @ p["w2"] - y) ** 2)


def main(port, process, dies, fitted):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        2,
        process,
        initialization_timeout=30,
        heartbeat_timeout_seconds=10,
    )
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from stopgrad_jax.train import fit, make_step

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    half = slice(8 * process, 8 * process + 8)
    layout = NamedSharding(mesh, P("data"))
    put = jax.make_array_from_process_local_data
    batch = tuple(put(layout, part[half]) for part in data())

    step = make_step(loss, optax.adamw(RATE, weight_decay=DECAY))
    state = step.init(params())  # the same on both: nobody has to send them
    if fitted:
        state, history = fit(
            step, state, [batch] * STEPS, steps=STEPS, log_every=5, progress=False
        )
        losses = history["loss"]
    else:
        losses = []
        for n in range(STEPS):
            if dies and n == dies:
                os._exit(3)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if n == 0:
                print("started", file=sys.stderr, flush=True)
    result = {
        "losses": [float(x) for x in losses],
        "params": {k: np.asarray(x).tolist() for k, x in state.params.items()},
        "devices": [jax.device_count(), len(state.params["w1"].sharding.device_set)],
    }
    print(json.dumps(result), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
