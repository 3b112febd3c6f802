"""The programs that are measured."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax as sg

GOLDEN = pathlib.Path(__file__).parents[1] / "notebooks" / "seed_golden.json"


def instructions(fun, *args):
    """Count the instructions of an optimized program, fused ones included."""
    text = fun.lower(*args).compile().as_text()
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


def classifier(width):
    """Two layers with a named one between: as one function, and split by hand."""
    keys = jax.random.split(jax.random.key(0), 3)
    w, v, x = (jax.random.normal(k, (width, width)) / width**0.5 for k in keys)

    def first(w, x):
        return jnp.tanh(x @ w)

    def rest(h, v):
        return jnp.mean(jax.nn.logsumexp(jnp.sin(h @ v), axis=-1))

    def function(w, v, x):
        return rest(sg.name(first(w, x), "h"), v)

    def split(w, v, x):
        return jax.grad(rest)(first(w, x), v)

    return function, split, (w, v, x)


def _layers(size):
    """Equal layers, as most long programs have: about 7.5 equations each."""
    weights = [jnp.eye(8) * 0.1] * 4

    def function(x, weights):
        for k in range(round(size / 7.5)):
            x = jax.nn.relu(x @ weights[k % 4]) + x
            x = x / jnp.sqrt(1 + jnp.mean(x**2))
        return jnp.sum(x)

    return function, (jnp.ones((1, 8)), weights)


def _chain(size):
    """Elementwise operations, four to a round."""

    def function(x):
        for _ in range(size // 4):
            x = jnp.sin(jnp.tanh(x) * 0.5 + x)
        return jnp.sum(x)

    return function, (jnp.ones(8),)


def _mixed(size):
    """Operations and constants at random: next to nothing occurs twice."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, 6, round(size / 1.7))
    constants = random.uniform(0.5, 1.5, len(kinds))

    def function(x):
        for kind, c in zip(kinds, constants, strict=True):
            operations = (
                lambda x, c: jnp.sin(x),
                lambda x, c: x * c,
                lambda x, c: x + c,
                lambda x, c: jnp.where(x > c, x, -x),
                lambda x, c: x / (c + x * x),
                lambda x, c: jnp.roll(x, 1),
            )
            x = operations[kind](x, float(c))
        return jnp.sum(x)

    return function, (jnp.ones(8),)


LONG = {"layers": _layers, "chain": _chain, "mixed": _mixed}


def data():
    """Samples of experiments A and B."""
    golden = json.loads(GOLDEN.read_text())
    return (np.array(golden[key], np.float32) for key in "xy")


def loss(w, b, x, y):
    """Squared error of one sample."""
    return jnp.sum((y - (x * w + b)) ** 2) / 64


def training(sg):
    """Experiment B's update by our query and by `jax.grad`, as loop and as scan."""
    xs, ys = data()
    start = (jnp.float32(2), jnp.float32(1))

    def make(differentiate):
        def update(params, sample):
            value, grads = differentiate(*params, *sample)
            new = tuple(p - 0.01 * g for p, g in zip(params, grads, strict=True))
            return new, value

        step = jax.jit(update)

        def loop():
            params = start
            for sample in zip(xs, ys, strict=True):
                params, _ = step(params, sample)
            return params

        @jax.jit
        def scanned(params):
            def epoch(params, _):
                return jax.lax.scan(update, params, (xs, ys))[0], None

            return jax.lax.scan(epoch, params, None, length=1000)[0]

        return loop, lambda: scanned(start)

    sides = {
        "sg.value_and_gradients": sg.value_and_gradients(loss, ("w", "b")),
        "jax.value_and_grad": jax.value_and_grad(loss, (0, 1)),
    }
    runs = {}
    for name, differentiate in sides.items():
        loop, scanned = make(differentiate)
        runs[f"{name}, jitted step"] = loop, 32
        runs[f"{name}, one lax.scan"] = scanned, 32_000
    return runs


def tensorflow_training():
    """Experiments A and B in TensorFlow 1's way: a graph and a session."""
    import tensorflow as tf

    v1 = tf.compat.v1
    xs, ys = data()
    runs = {}
    for experiment in "AB":
        graph = tf.Graph()
        with graph.as_default():
            x, y = v1.placeholder("float32"), v1.placeholder("float32")
            w = v1.Variable(2.0, use_resource=False)
            b = v1.Variable(1.0, use_resource=False)
            error = tf.reduce_sum((y - (x * w + b)) ** 2) / 64
            grads = v1.gradients(error, [w, b])
            if experiment == "A":
                update = v1.train.GradientDescentOptimizer(0.01).minimize(error)
                fetch = [update, error, grads[0]]
            else:
                pairs = zip((w, b), grads, strict=True)
                fetch = [
                    [v1.assign(p, p - 0.01 * g) for p, g in pairs],
                    error,
                    grads[0],
                ]
            session = v1.Session(graph=graph)
            session.run(v1.global_variables_initializer())

        def loop(session=session, fetch=fetch, feeds=(x, y)):
            for sample in zip(xs, ys, strict=True):
                session.run(fetch, dict(zip(feeds, sample, strict=True)))
            return 0

        runs[f"TensorFlow session, experiment {experiment}"] = loop, 32
    return runs
