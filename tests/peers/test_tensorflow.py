"""Our `gradients` against `tf.gradients`, live: random programs and the article's."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from peers import programs

import stopgrad_jax as sg

SEED = int(os.environ.get("STOPGRAD_SEED", "0"))
PROGRAMS, CHUNK = 500, 50
GOLDEN = json.loads(
    (pathlib.Path(__file__).parent.parent / "seed_golden.json").read_text()
)
SAMPLES = np.array([GOLDEN["x"], GOLDEN["y"]], np.float32).T[:20]
RATE = 0.01

Answer = Sequence[Any]


def script(program: programs.Program) -> dict[str, Any]:
    """Execute what `programs.source` prints; its main part is left out."""
    namespace: dict[str, Any] = {"__name__": program.title}
    text = programs.source(program)
    exec(compile(text, f"<{program.title}>", "exec"), namespace)
    return namespace


def evaluate(rows: list[list[Any]]) -> list[list[np.ndarray | None]]:
    """Run the tensors of the current graph at once; None stays None."""
    config = tf.compat.v1.ConfigProto()
    # The arithmetic that the program says, not what grappler makes of constants.
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    with tf.compat.v1.Session(config=config) as session:
        values = session.run([[g for g in row if g is not None] for row in rows])
    have = iter([value for row in values for value in row])
    return [[None if g is None else next(have) for g in row] for row in rows]


def run_tensorflow(made: list[programs.Program]) -> list[list[np.ndarray | None]]:
    """Answer all queries in one graph and one session run."""
    with tf.Graph().as_default():
        return evaluate([script(program)["tf_gradients"]() for program in made])


@functools.cache
def chunk(start: int) -> tuple[list[programs.Program], list[Any]]:
    """Programs of a chunk and TensorFlow's answers."""
    made = [programs.generate(SEED, start + i) for i in range(CHUNK)]
    return made, run_tensorflow(made)


def differences(ours: Answer, theirs: Answer, program: programs.Program) -> list[str]:
    """Say where two answers differ in None, shape, dtype or value."""
    found = []
    for x, our, their in zip(program.xs, ours, theirs, strict=True):
        if our is None or their is None:
            same = our is their
        else:
            # Float32 knows the terms of a sum to 1e-7 of the largest, and where they
            # cancel that is the error of what is left (4e-7 at worst, seed 0).
            atol = 2e-6 * max(1.0, float(np.max(np.abs(their))))
            same = (our.shape, our.dtype) == (their.shape, their.dtype)
            same = same and np.allclose(our, their, rtol=1e-5, atol=atol)
        if not same:
            found.append(f"d/d{x}: {our!r} is not {their!r}")
    return found


@pytest.mark.parametrize("start", range(0, PROGRAMS, CHUNK))
def test_random_programs_agree(start):
    failures = []
    for program, theirs in zip(*chunk(start), strict=True):
        ours = script(program)["jax_gradients"]()
        if found := differences(ours, theirs, program):
            lines = ["Ours is not TensorFlow's:", *found, "", programs.source(program)]
            failures.append("\n".join(lines))
    count = f"{len(failures)} of {CHUNK} programs differ, the first of them:\n"
    assert not failures, count + failures[0]


def test_the_generator_covers_what_it_should():
    """Every operation, None and numbers, intermediate xs, stops that matter."""
    seen, ops = collections.Counter(), set[programs.Op]()
    for start in range(0, PROGRAMS, CHUNK):
        made, answers = chunk(start)
        free = run_tensorflow([dataclasses.replace(p, stops=()) for p in made])
        for program, theirs, unstopped in zip(made, answers, free, strict=True):
            calls = [c for s in program.statements for c in programs.calls(s.call)]
            ops |= {c.op for c in calls}
            targets = {s.target for s in program.statements}
            seen["None"] += any(g is None for g in theirs)
            seen["zeros"] += any(g is not None and not np.any(g) for g in theirs)
            seen["numbers"] += any(g is not None and np.any(g) for g in theirs)
            seen["x in between"] += not targets.isdisjoint(program.xs)
            seen["stop in between"] += not targets.isdisjoint(program.stops)
            seen["stop that matters"] += bool(differences(theirs, unstopped, program))
            seen["x that is stopped"] += not set(program.xs).isdisjoint(program.stops)
            seen["x twice"] += len(set(program.xs)) < len(program.xs)
            seen["y twice"] += len(set(program.ys)) < len(program.ys)
            seen["several ys"] += len(program.ys) > 1
            seen["cotangent"] += any(g is not None for g in program.grad_ys)
            seen["None for a cotangent"] += any(g is None for g in program.grad_ys)
    print(dict(seen))
    assert ops == set(programs.OPS)
    assert min(seen.values()) >= PROGRAMS // 50, seen


def test_a_seed_gives_the_same_programs_and_they_run_as_printed(capsys):
    text = programs.source(programs.generate(SEED, 7))
    assert text == programs.source(programs.generate(SEED, 7))
    assert text != programs.source(programs.generate(SEED + 1, 7))
    exec(compile(text, "<printed>", "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2


def loss(w, b, x, y):
    """Squared error of experiments A and B; reads the same in both libraries."""
    return (y - (x * w + b)) ** 2 / (2 * 32)


def tensorflow_steps(experiment: str) -> list[list[float]]:
    """Rows of w, b, loss, d loss / d w while TensorFlow trains."""
    v1, rows = tf.compat.v1, []
    with tf.Graph().as_default(), v1.Session() as session:
        x, y = v1.placeholder(tf.float32), v1.placeholder(tf.float32)
        w, b = v1.Variable(2.0), v1.Variable(1.0)
        error = loss(w, b, x, y)
        dw, db = tf.gradients(error, [w, b])
        # What is read is from before the update.
        with tf.control_dependencies([error, dw, db]):
            if experiment == "A":
                update = v1.train.GradientDescentOptimizer(RATE).minimize(error)
            else:
                update = [v1.assign_sub(w, RATE * dw), v1.assign_sub(b, RATE * db)]
        session.run(v1.global_variables_initializer())
        for sample in SAMPLES:
            feed = dict(zip((x, y), sample, strict=True))
            value, grad, _ = session.run([error, dw, update], feed)
            rows.append([*session.run([w, b]), value, grad])
    return rows


def our_steps(experiment: str) -> list[list[jax.Array]]:
    """The same rows: A with an optimizer, B with an update by hand."""
    params, rows = [jnp.float32(2), jnp.float32(1)], []
    optimizer = optax.sgd(RATE)
    state = optimizer.init(params)
    query = sg.value_and_gradients(loss, ["w", "b"])
    for sample in SAMPLES:
        value, grads = query(*params, *sample)
        if experiment == "A":
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
        else:
            params = [p - RATE * g for p, g in zip(params, grads, strict=True)]
        rows.append([*params, value, grads[0]])
    return rows


@pytest.mark.parametrize("experiment", ["A", "B"])
def test_experiments_a_and_b(experiment):
    """Ours, TensorFlow's of now and TensorFlow's as recorded: 20 steps of each."""
    rng = np.random.RandomState(GOLDEN["seed"])
    x = rng.randint(-10, 100, 32)
    pairs = (x + rng.randn(32) / 32, 3 * x + 2 + rng.randn(32) / 32)
    np.testing.assert_array_equal(SAMPLES, np.float32(pairs).T[:20])

    ours = np.array(our_steps(experiment))
    told = [[r[k] for k in ("w", "b", "loss", "grad_w")] for r in GOLDEN[experiment]]
    for theirs in (np.array(tensorflow_steps(experiment)), np.array(told)):
        np.testing.assert_allclose(ours[:, :2], theirs[:, :2], rtol=1e-5)
        np.testing.assert_allclose(ours[:, 2:], theirs[:, 2:], rtol=0, atol=1e-4)


def test_experiment_c_intermediates_and_stops():
    def c(a):
        return a + sg.name(2 * a, "b")

    xs = ["a", "b"]
    ours = [sg.gradients(c, xs)(0.0), sg.gradients(c, xs, stop_gradients=xs)(0.0)]
    with tf.Graph().as_default():
        a = tf.constant(0.0)
        b = 2 * a
        total = tf.gradients(a + b, [a, b])
        partial = tf.gradients(a + b, [a, b], stop_gradients=[a, b])
        assert ours == evaluate([total, partial]) == [[3, 1], [1, 1]]


def test_experiment_d_a_stop_that_disconnects():
    ours = sg.gradients(lambda u, v: jax.lax.stop_gradient(3 * u) * v, ["u", "v"])
    with tf.Graph().as_default():
        w1, w2 = tf.constant(2.0), tf.constant(2.0)
        theirs = tf.gradients(tf.stop_gradient(3 * w1) * w2, [w1, w2])
        assert ours(2.0, 2.0) == evaluate([theirs])[0] == [None, 6]


def test_experiment_e_a_stop_that_another_path_goes_round():
    def e(a, b):
        return jax.lax.stop_gradient(a + b) + (a + b)

    ours = sg.gradients(e, ["a", "b"])(1.0, 1.0)
    with tf.Graph().as_default():
        a, b = tf.constant(1.0), tf.constant(1.0)
        theirs = tf.gradients(tf.stop_gradient(a + b) + (a + b), [a, b])
        assert ours == evaluate([theirs])[0] == [1, 1]
