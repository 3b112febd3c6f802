"""Our `gradients` against `tf.gradients`, live: random programs and the article's."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
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
RATE = 0.01

Answer = list[np.ndarray | None]


def script(program: programs.Program) -> dict[str, Any]:
    """Execute what `programs.source` prints; its main part is left out."""
    namespace: dict[str, Any] = {"__name__": program.title}
    text = programs.source(program)
    exec(compile(text, f"<{program.title}>", "exec"), namespace)
    return namespace


def run_tensorflow(made: list[programs.Program]) -> list[Answer]:
    """Answer all queries in one graph and one session run."""
    config = tf.compat.v1.ConfigProto()
    # The arithmetic that the program says, not what grappler makes of constants.
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        grads = [script(program)["tf_gradients"]() for program in made]
        wanted = [[g for g in row if g is not None] for row in grads]
        values = [iter(row) for row in session.run(wanted)]
    return [
        [None if g is None else next(have) for g in row]
        for row, have in zip(grads, values, strict=True)
    ]


@functools.cache
def chunk(start: int) -> tuple[list[programs.Program], list[Answer]]:
    """Programs of a chunk and TensorFlow's answers."""
    made = [programs.generate(SEED, start + i) for i in range(CHUNK)]
    return made, run_tensorflow(made)


def differences(ours: Answer, theirs: Answer, xs: tuple[str, ...]) -> list[str]:
    """Say where two answers differ in None, shape, dtype or value."""
    found = []
    for x, our, their in zip(xs, ours, theirs, strict=True):
        if our is None or their is None:
            if our is not their:
                found.append(f"d/d{x}: ours {our}, TensorFlow's {their}")
            continue
        our = np.asarray(our)
        same_type = (our.shape, our.dtype) == (their.shape, their.dtype)
        # A sum of float32 terms is known to a few ulps of its largest term, and the
        # largest entry of the gradient is the size of such terms.
        atol = 1e-5 * max(1.0, float(np.max(np.abs(their))))
        if not same_type or not np.allclose(our, their, rtol=1e-4, atol=atol):
            found.append(
                f"d/d{x}: ours {our.dtype}{our.shape} {our.tolist()}, "
                f"TensorFlow's {their.dtype}{their.shape} {their.tolist()}"
            )
    return found


@pytest.mark.parametrize("start", range(0, PROGRAMS, CHUNK))
def test_random_programs_agree(start):
    failures = []
    for program, theirs in zip(*chunk(start), strict=True):
        ours = script(program)["jax_gradients"]()
        found = differences(ours, theirs, program.xs)
        if found:
            failures.append("\n".join([*found, "", programs.source(program)]))
    if failures:
        rest = f"{len(failures)} programs differ in this chunk; the first:\n"
        pytest.fail(rest + failures[0], pytrace=False)


def test_the_generator_covers_what_it_should():
    """None results, stops that matter, intermediate xs, every kind of statement."""
    seen, ops = collections.Counter(), set[programs.Op]()
    for start in range(0, PROGRAMS, CHUNK):
        for program, theirs in zip(*chunk(start), strict=True):
            called = [c for s in program.statements for c in programs.calls(s.call)]
            ops |= {c.op for c in called}
            inputs = set(program.inputs)
            seen["none"] += sum(g is None for g in theirs)
            seen["not zero"] += sum(g is not None and np.any(g) for g in theirs)
            seen["intermediate x"] += any(x not in inputs for x in program.xs)
            seen["stop of an intermediate"] += any(
                s not in inputs for s in program.stops
            )
            seen["several ys"] += len(program.ys) > 1
            seen["cotangents"] += any(g is not None for g in program.grad_ys)
            seen["None cotangents"] += any(g is None for g in program.grad_ys)
    assert ops == set(programs.OPS)
    assert min(seen.values()) >= PROGRAMS // 10, seen


def test_some_stops_change_the_answer():
    changed = 0
    for program in chunk(0)[0]:
        free = dataclasses.replace(program, stops=())
        held = script(program)["jax_gradients"]()
        same = differences(script(free)["jax_gradients"](), held, program.xs)
        changed += bool(same)
    assert changed >= CHUNK // 10


def loss(w, b, x, y):
    """Squared error of experiments A and B; reads the same in both libraries."""
    return ((y - (x * w + b)) ** 2) / (2 * 32)


@pytest.mark.parametrize("experiment", ["A", "B"])
def test_experiments_a_and_b_live(experiment):
    """The same 20 steps in a TensorFlow session and here, and what was recorded."""
    v1 = tf.compat.v1
    samples = list(zip(GOLDEN["x"][:20], GOLDEN["y"][:20], strict=True))
    told = []
    with tf.Graph().as_default(), v1.Session() as session:
        x, y = v1.placeholder(tf.float32), v1.placeholder(tf.float32)
        w, b = v1.Variable(2.0), v1.Variable(1.0)
        error = loss(w, b, x, y)
        dw, db = v1.gradients(error, [w, b])
        with tf.control_dependencies([error, dw, db]):
            if experiment == "A":
                optimizer = v1.train.GradientDescentOptimizer(RATE)
                update = optimizer.minimize(error)
            else:
                update = [v1.assign_sub(w, RATE * dw), v1.assign_sub(b, RATE * db)]
        session.run(v1.global_variables_initializer())
        for sample in samples:
            feed = dict(zip((x, y), sample, strict=True))
            value, grad, _ = session.run([error, dw, update], feed)
            told.append([*session.run([w, b]), value, grad])

    params = [jnp.float32(2), jnp.float32(1)]
    optimizer = optax.sgd(RATE)
    state, ours = optimizer.init(params), []
    query = jax.jit(sg.value_and_gradients(loss, ["w", "b"]))
    for sample in samples:
        value, grads = query(*params, *np.float32(sample))
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        ours.append([*params, value, grads[0]])

    golden = [[r["w"], r["b"], r["loss"], r["grad_w"]] for r in GOLDEN[experiment]]
    for rows in (np.array(told), np.array(golden)):
        np.testing.assert_allclose(np.array(ours)[:, :2], rows[:, :2], rtol=1e-5)
        np.testing.assert_allclose(
            np.array(ours)[:, 2:], rows[:, 2:], rtol=0, atol=1e-4
        )


def test_experiments_c_d_and_e_live():
    def numbers(grads):
        return [None if g is None else float(g) for g in grads]

    def run(grads):
        with tf.compat.v1.Session() as session:
            return [None if g is None else float(session.run(g)) for g in grads]

    with tf.Graph().as_default():
        a = tf.constant(0.0)
        b = 2 * a
        xs = [a, b]
        total, partial = (
            tf.gradients(a + b, xs),
            tf.gradients(a + b, xs, stop_gradients=xs),
        )

        def c(a):
            return a + sg.name(2 * a, "b")

        held = {"stop_gradients": ["a", "b"]}
        assert run(total) == numbers(sg.gradients(c, ["a", "b"])(0.0)) == [3, 1]
        assert (
            run(partial) == numbers(sg.gradients(c, ["a", "b"], **held)(0.0)) == [1, 1]
        )

        w = [tf.constant(2.0), tf.constant(2.0)]
        theirs = tf.gradients(tf.stop_gradient(3 * w[0]) * w[1], w)
        d = sg.gradients(lambda u, v: jax.lax.stop_gradient(3 * u) * v, ["u", "v"])
        assert run(theirs) == numbers(d(2.0, 2.0)) == [None, 6]

        p = [tf.constant(1.0), tf.constant(1.0)]
        theirs = tf.gradients(tf.stop_gradient(p[0] + p[1]) + (p[0] + p[1]), p)
        e = sg.gradients(
            lambda a, b: jax.lax.stop_gradient(a + b) + (a + b), ["a", "b"]
        )
        assert run(theirs) == numbers(e(1.0, 1.0)) == [1, 1]
