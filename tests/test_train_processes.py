"""Two processes train together, and none outlives a test, whatever happens to one."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
import two_processes

HERE = pathlib.Path(__file__).parent
SECONDS = 50  # for both processes to come to an end


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def pair(*, dies=0, fitted=0):
    """Start two processes; end them whatever happens."""
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    processes = []
    try:
        for n in range(2):
            deadly = dies if n == 1 else 0
            args = [HERE / "two_processes.py", port, n, deadly, fitted]
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, args)],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate(timeout=10)


def one_device():
    """The whole batch on one device, by hand."""
    p, batch = two_processes.params(), two_processes.data()
    optimizer = optax.adamw(two_processes.RATE, weight_decay=two_processes.DECAY)
    state, losses = optimizer.init(p), []

    @jax.jit
    def step(p, state):
        value, grads = jax.value_and_grad(two_processes.loss)(p, batch)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    for _ in range(two_processes.STEPS):
        p, state, value = step(p, state)
        losses.append(float(value))
    return losses, p


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize("fitted", [0, 1], ids=["steps", "fit"])
def test_two_processes_agree_with_one_device(fitted):
    end = time.monotonic() + SECONDS
    with pair(fitted=fitted) as processes:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=end - time.monotonic())
            assert process.returncode == 0, err
            results.append(json.loads(out.splitlines()[-1]))
    losses, p = one_device()
    for result in results:
        assert result["devices"] == [4, 4]
        # Sums of 16 numbers in another order, over 20 steps: see test_train_devices.
        np.testing.assert_allclose(result["losses"], losses, rtol=2e-5)
        for name, x in result["params"].items():
            np.testing.assert_allclose(x, p[name], rtol=2e-5, atol=2e-5)
    assert results[0] == results[1]


def test_the_survivor_of_a_lost_peer_ends():
    """It stops by itself, or is stopped: in bounded time in any case."""
    start = time.monotonic()
    with pair(dies=5) as (survivor, peer):
        peer.communicate(timeout=SECONDS)
        assert peer.returncode == 3
        with contextlib.suppress(subprocess.TimeoutExpired):
            survivor.communicate(timeout=20)
            assert survivor.returncode != 0  # it cannot have finished alone
    assert survivor.returncode != 0
    assert survivor.poll() is not None
    assert time.monotonic() - start < SECONDS + 40
