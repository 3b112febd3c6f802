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
import programs
import pytest
import tensorflow as tf

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
