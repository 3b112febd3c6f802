"""The loop: chunks of steps, progress, interruptions, and that nothing is lost."""

import builtins
import gc
import itertools
import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(1)
XS = np.asarray(RNG.normal(size=(23, 4, 3)), np.float32)
YS = np.asarray(RNG.normal(size=(23, 4)), np.float32)


def params():
    return {"encoder": jnp.eye(3), "head": f32(1.0, -1.0, 0.5)}


def loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["encoder"]) @ p["head"] - y) ** 2)


def step_of(fun=loss, **options):
    return make_step(fun, optax.adamw(1e-2), frozen="encoder", **options)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array(x).tobytes() == np.array(y).tobytes() for x, y in leaves)


SOURCES = {
    "arrays": (jnp.asarray(XS), jnp.asarray(YS)),
    "NumPy arrays": (XS, YS),
    "function": lambda n: (jnp.asarray(XS)[n], jnp.asarray(YS)[n]),
    "list": list(zip(XS, YS, strict=True)),
    "generator": None,
}


def source(name):
    if name == "generator":
        return zip(XS, YS, strict=True)
    return SOURCES[name]


@pytest.mark.parametrize("name", SOURCES)
def test_all_kinds_of_batches_are_a_loop_of_steps(name):
    step = step_of()
    state, losses = step.init(params()), []
    for batch in zip(XS, YS, strict=True):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    p = params()
    start = step.init(p)
    calls = []
    ours, history = fit(
        step,
        start,
        source(name),
        steps=23,
        log_every=10,
        progress=False,
        callback=lambda s, m: calls.append((int(s.step), m["loss"])),
    )
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(ours.params["head"], state.params["head"], rtol=1e-5)
    assert ours.step == 23
    assert [n for n, _ in calls] == [10, 20, 23]
    np.testing.assert_array_equal(
        np.concatenate([m for _, m in calls]), history["loss"]
    )
    assert ours.params["encoder"] is p["encoder"]
    assert not any(x.is_deleted() for x in jax.tree.leaves((start, p)))


@pytest.mark.parametrize("name", ["arrays", "function", "list"])
def test_the_loss_is_traced_in_the_first_call_alone(name):
    traces = []

    def fun(p, batch):
        traces.append(1)
        return loss(p, batch)

    step = step_of(fun)
    batches = source(name)
    for _ in range(3):
        fit(step, step.init(params()), batches, steps=7, log_every=5, progress=False)
    assert len(traces) == 2  # for its gradient, and to see what it trains


def test_a_run_that_is_resumed_is_the_uninterrupted_one():
    fun = lambda p, batch, key: (
        loss(p, batch) + 0.1 * jax.random.normal(key) * jnp.sum(p["head"])
    )
    step, batches, key = step_of(fun), SOURCES["function"], jax.random.key(3)
    options = {"key": key, "progress": False}
    whole, history = fit(step, step.init(params()), batches, steps=20, **options)
    half, first = fit(step, step.init(params()), batches, steps=10, **options)
    state, second = fit(step, half, batches, steps=10, **options)
    assert same(state, whole)
    assert same(np.concatenate([first["loss"], second["loss"]]), history["loss"])
    # The key of a step is that of its number.
    by_hand = step.init(params())
    for n in range(3):
        by_hand, metrics = step(by_hand, batches(n), jax.random.fold_in(key, n))
        np.testing.assert_allclose(metrics["loss"], history["loss"][n], rtol=1e-6)


def test_what_the_step_hands_on_is_never_copied_or_given_up():
    """Also behind a jit of the user's own."""
    step, p = step_of(), params()
    for outer in (step, lambda s, b: step(s, b), jax.jit(lambda s, b: step(s, b))):
        for batches in (SOURCES["arrays"], SOURCES["list"]):
            state, _ = fit(outer, step.init(p), batches, steps=5, progress=False)
            assert state.params["encoder"] is p["encoder"]


def test_any_function_of_a_state_and_a_batch_will_do():
    def step(state, batch):
        total, count = state
        return (total + jnp.sum(batch), count), {"deep": [total, {"n": count}]}

    state, history = fit(
        step, (0.0, jnp.int32(7)), lambda n: n * jnp.ones(2), steps=4, progress=False
    )
    assert (state[0], state[1]) == (12.0, 7)  # 2 * (0 + 1 + 2 + 3)
    np.testing.assert_array_equal(history["deep"][0], [0, 0, 2, 6])
    np.testing.assert_array_equal(history["deep"][1]["n"], [7] * 4)


def test_nothing_is_lost_when_batches_end():
    step = step_of()
    expected, losses = fit(
        step, step.init(params()), SOURCES["list"], steps=23, progress=False
    )
    with pytest.raises(ValueError, match="23 batches, then") as caught:
        fit(
            step,
            step.init(params()),
            source("generator"),
            steps=30,
            log_every=10,
            progress=False,
        )
    assert same(caught.value.state, expected)
    assert same(caught.value.history, losses)
    assert "that after 23 good steps" in "".join(caught.value.__notes__)


class Stop(Exception):
    pass


def test_nothing_is_lost_when_something_raises():
    step = step_of()
    run = lambda **k: fit(step, step.init(params()), progress=False, **k)

    def callback(state, metrics):
        if state.step == 10:
            raise Stop

    batches = SOURCES["arrays"]
    expected, losses = run(batches=batches, steps=10)
    with pytest.raises(Stop) as caught:
        run(batches=batches, steps=20, log_every=5, callback=callback)
    assert same(caught.value.state, expected)
    assert same(caught.value.history, losses)

    def failing():
        yield from SOURCES["list"][:10]
        raise Stop

    with pytest.raises(Stop) as caught:
        run(batches=failing(), steps=20, log_every=3)
    assert caught.value.state.step == 10
    assert len(caught.value.history["loss"]) == 10
    # A batch of another shape, of which the loss complains when it is traced
    odd = [*SOURCES["list"][:4], (np.ones((4, 2), np.float32), YS[0])]
    with pytest.raises(TypeError) as caught:
        run(batches=odd, steps=20)
    assert caught.value.state.step == 4
    assert not any(x.is_deleted() for x in jax.tree.leaves(caught.value.state))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_a_failing_program_used_up_is_not_handed_over():
    """A program that fails while it runs has its state already: the first is left."""

    def raises(x):
        if x >= 3:
            raise Stop("in the program")
        return np.float32(0)

    step = step_of()

    def outer(state, batch):
        out = jax.ShapeDtypeStruct((), jnp.float32)
        extra = jax.pure_callback(raises, out, state.step)
        state, metrics = step(state, batch)
        return state, {"loss": metrics["loss"] + extra}

    start = step.init(params())
    with pytest.raises(Exception, match="in the program") as caught:
        fit(outer, start, SOURCES["function"], steps=9, log_every=3, progress=False)
    assert same(caught.value.state, start)
    assert len(caught.value.history["loss"]) == 3
    jax.block_until_ready(caught.value.state)


def test_a_callback_may_end_the_run():
    step = step_of()
    state, history = fit(
        step,
        step.init(params()),
        SOURCES["arrays"],
        steps=20,
        log_every=5,
        progress=False,
        callback=lambda state, metrics: bool(state.step >= 10),
    )
    assert state.step == 10
    assert history["loss"].shape == (10,)


def test_a_bar_shows_the_loss(capsys):
    pytest.importorskip("tqdm")
    step = step_of()
    _, history = fit(
        step, step.init(params()), SOURCES["arrays"], steps=20, log_every=5
    )
    out, err = capsys.readouterr()
    assert not out
    assert "20/20" in err
    assert f"loss {history['loss'][-1]:.4g}" in err
    assert err.count("\r") <= 7  # one a chunk, and a first and last one


def test_lines_where_there_is_no_bar(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    step = step_of(nonfinite="skip")
    x = XS.copy()
    x[[7, 9]] = np.nan
    fit(step, step.init(params()), (x, YS), steps=12, log_every=5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines if "steps/s" in line] == [
        "step 5/12",
        "step 10/12",
        "step 12/12",
    ]
    (told,) = [line for line in lines if "nonfinite" in line]
    assert told == (
        "2 of these steps had a nonfinite gradient, the first of them step 7 (from 0): "
        "head"
    )
    fit(
        step,
        step.init(params()),
        (XS, YS),
        steps=12,
        log_every=5,
        callback=lambda *_: True,
    )
    assert capsys.readouterr().err.splitlines()[-1] == "ended after 5 of 12 steps"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fit(step, step.init(params()), (XS, YS), steps=2)
    assert not capsys.readouterr().err


def test_a_step_that_is_gone_leaves_no_program():
    step = step_of()
    fit(step, step.init(params()), SOURCES["arrays"], steps=2, progress=False)
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None


# The article's experiments, in three lines each.

GOLDEN = json.loads((pathlib.Path(__file__).parent / "seed_golden.json").read_text())
POINTS = tuple(np.array(GOLDEN[k], np.float32) for k in "xy")


def line(p, point):
    x, y = point
    return jnp.sum((y - (x * p["w"] + p["b"])) ** 2) / (2 * 32)


def assert_told(history, golden):
    for key in ("w", "b"):
        told = [row[key] for row in golden]
        np.testing.assert_allclose(history["params"][key], told, rtol=1e-5)
    np.testing.assert_allclose(history["loss"], [r["loss"] for r in golden], atol=1e-4)
    grads = [row["grad_w"] for row in golden]
    np.testing.assert_allclose(history["grad_w"], grads, atol=1e-4)


def test_experiment_a_an_optimizer():
    step = make_step(line, optax.sgd(0.01))

    def watched(state, point):
        grad_w = sg.gradients(line, "p/w")(state.params, point)
        state, metrics = step(state, point)
        return state, {**metrics, "grad_w": grad_w, "params": state.params}

    start = step.init({"w": jnp.float32(2), "b": jnp.float32(1)})
    _, history = fit(watched, start, POINTS, steps=20, progress=False)
    assert_told(history, GOLDEN["A"])


def test_experiment_b_your_own_update():
    def step(p, point):
        value, grads = sg.value_and_gradients(line, "p")(p, point)
        p = jax.tree.map(lambda p, g: p - 0.01 * g, p, grads)
        return p, {"loss": value, "grad_w": grads["w"], "params": p}

    start = {"w": jnp.float32(2), "b": jnp.float32(1)}
    _, history = fit(step, start, POINTS, steps=20, progress=False)
    assert_told(history, GOLDEN["B"])


def test_the_article_line_by_line():
    """The same 20 points again and again: the line is found."""
    points = itertools.cycle(zip(*POINTS, strict=True))
    step = make_step(line, optax.sgd(0.01))
    start = step.init({"w": 2.0, "b": 1.0})
    state, _ = fit(step, start, points, steps=200, progress=False)
    assert abs(state.params["w"] - 3) < 0.05
