"""Measure what the query costs: ratios, side by side in one run.

(a) `gradients` at a named point against the same function split by hand;
(b) trace, and trace + lower + compile, of `gradients` against `jax.grad`;
(c) `edit` with nothing changed against the plain function;
(d) experiments A and B: steps per second against TensorFlow's session and `jax.jit`;
(e) each gate, forward and backward, against hand-written JAX and what users have today;
(f) a model that is frozen in nine parts of ten, against the usual recipes;
(g) `flow` against tracing `jax.grad`, and pictures;
(h) estimators against hand-written JAX and the libraries that have them;
(i) training steps and `fit` against loops by hand and other libraries; devices, memory;
(j) many leaves.

Each figure is the median of several rounds; in each round both sides are measured, one
after the other. The table is printed and written to build/benchmarks.json.
"""

import functools
import importlib.util
import json
import pathlib
import platform
import statistics

import estimators
import flow
import freezing
import gates
import jax
import leaves
import programs
import training
from measure import repeated, seconds, side_by_side
from tqdm import tqdm

import stopgrad_jax as sg

OUT = pathlib.Path(__file__).parents[1] / "build" / "benchmarks.json"


def named_point():
    """(a) Run time and instructions at a named point."""
    for size in (64, 1024):
        function, split, args = programs.classifier(size)
        ours, theirs = jax.jit(sg.gradients(function, "h")), jax.jit(split)
        times = 200 if size == 64 else 5
        row = side_by_side(
            repeated(ours, *args, times=times), repeated(theirs, *args, times=times)
        )
        count = programs.instructions(ours, *args), programs.instructions(theirs, *args)
        yield f"a. run, width {size}", {**row, "instructions": count}


def tracing(sizes=(1_000, 5_000, 20_000)):
    """(b) Trace alone."""

    def traced(differentiate, function, args):
        jax.make_jaxpr(differentiate(lambda *a: function(*a)))(*args)

    yield from _long_programs("trace", traced, programs.LONG, sizes)


def compiling(sizes=(1_000, 5_000, 20_000)):
    """(b) Trace, lower and compile.

    Only layers: XLA takes minutes for a thousand elementwise operations in a row. And
    without its costly passes, on both sides: they take many minutes for the longest.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }

    def built(differentiate, function, args):
        lowered = jax.jit(differentiate(lambda *a: function(*a))).lower(*args)
        lowered.compile(compiler_options=options)

    layers = {"layers": programs.LONG["layers"]}
    yield from _long_programs("compile", built, layers, sizes)


def _long_programs(verb, measured, makers, sizes):
    for name, make in makers.items():
        for size in sizes:
            sides = [
                functools.partial(measured, differentiate, *make(size))
                for differentiate in (lambda f: sg.gradients(f, 0), jax.grad)
            ]
            rounds = {1_000: 5, 5_000: 3}.get(size, 1)
            row = side_by_side(*sides, rounds=rounds, warm=size < 20_000)
            yield f"b. {verb} {name}, {size} equations", row


def identity_edit():
    """(c) An edit that changes nothing."""
    function, _, args = programs.classifier(64)
    ours, theirs = jax.jit(sg.edit(function, {"h": lambda h: h})), jax.jit(function)
    row = side_by_side(
        repeated(ours, *args, times=200), repeated(theirs, *args, times=200)
    )
    count = programs.instructions(ours, *args), programs.instructions(theirs, *args)
    yield "c. identity edit", {**row, "instructions": count}


def experiments():
    """(d) Experiments A and B, step by step and as one scan."""
    sides = programs.training(sg)
    if importlib.util.find_spec("tensorflow"):
        sides |= programs.tensorflow_training()
    times = {name: [] for name in sides}
    for _ in range(6):
        for name, (run, steps) in sides.items():
            times[name].append(seconds(run) / steps)
    rates = {name: 1 / statistics.median(side[1:]) for name, side in times.items()}
    slowest = min(rates, key=rates.get)
    for name, rate in rates.items():
        row = {"steps_per_second": rate, "against_slowest": rate / rates[slowest]}
        yield f"d. {name}", row


def main():
    """Run all of it, print the table, write the file."""
    rows = {}
    parts = (named_point, tracing, compiling, identity_edit, experiments)
    parts += (gates.rows, freezing.rows, flow.rows, estimators.rows, training.rows)
    parts += (leaves.rows,)
    for part in tqdm(parts, desc="benchmarks"):
        for name, row in part():
            rows[name] = row
            figures = ", ".join(f"{k} {shown(v)}" for k, v in row.items())
            tqdm.write(f"{name:44} {figures}")
    device = jax.devices()[0]
    about = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}, {device.device_kind}",
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


def shown(value):
    """Print numbers to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
