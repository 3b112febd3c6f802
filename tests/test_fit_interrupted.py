"""Ctrl-C in the loop: what it ends, what is handed back, and where it is left alone."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import pytest
from test_fit import SOURCES, params, same, step_of

from stopgrad_jax.train import fit

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def interrupts():
    """Let Ctrl-C raise, also where these tests are a background job themselves."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["arrays", "list"])
def test_ctrl_c_ends_the_run_with_all_that_was_done(name):
    step, before = step_of(), signal.getsignal(signal.SIGINT)

    def callback(state, metrics):
        if state.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    state, history = fit(
        step,
        step.init(params()),
        SOURCES[name],
        steps=20,
        log_every=5,
        progress=False,
        callback=callback,
    )
    assert state.step == len(history["loss"]) == 10
    expected, _ = fit(
        step, step.init(params()), SOURCES[name], steps=10, progress=False
    )
    assert same(state, expected)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_raises_at_once():
    before = signal.getsignal(signal.SIGINT)

    def batches():
        yield from SOURCES["list"][:7]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    step = step_of()
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(step, step.init(params()), batches(), steps=20, progress=False)
    assert caught.value.state.step == len(caught.value.history["loss"]) == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_between_two_steps_is_soon_enough():
    """With an iterable, the flag is looked at after each step."""

    def batches():
        for n, batch in enumerate(SOURCES["list"]):
            if n == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    step = step_of()
    state, history = fit(step, step.init(params()), batches(), steps=9, progress=False)
    assert state.step == len(history["loss"]) == 4


def test_in_a_thread_and_with_signals_ignored():
    step, result = step_of(), []

    def run():
        with jax.numpy_dtype_promotion("standard"):  # of this thread
            state = step.init(params())
            result.append(fit(step, state, SOURCES["list"], steps=3, progress=False))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)
    assert same(*result)


PROGRAM = """
import os, signal, jax.numpy as jnp, optax
from stopgrad_jax.train import fit, make_step

step = make_step(lambda w, x: jnp.mean((w - x) ** 2), optax.sgd(0.1))

def callback(state, metrics):
    os.kill(os.getpid(), signal.SIGINT)

state, history = fit(
    step, step.init(0.0), jnp.ones((6, 2)), steps=6, log_every=2, callback=callback,
    progress=False,
)
print(int(state.step), signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""


@pytest.mark.parametrize("ignored", [True, False], ids=["background job", "foreground"])
def test_a_process_that_is_started_with_it_ignored(ignored):
    """As a shell starts `python train.py &` in a script: a child inherits it."""
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    before = signal.signal(signal.SIGINT, handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    # All steps, and nothing was set; or the running chunk, and Python's own handler.
    assert out.split() == (["6", "True"] if ignored else ["2", "False"])
