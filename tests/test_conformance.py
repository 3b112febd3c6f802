"""The conformance matrix: every function, under every transform, in every context."""

import itertools
import os
import pathlib

import estimator_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import CASES, CONTEXTS, TREES
from conformance_cells import (
    ERRORS,
    NO_ORDER,
    NO_REMAT,
    TRANSFORMS,
    Program,
    expected_error,
)

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "support-matrix.md"
NUMBERS = {reason: number for number, reason in enumerate(ERRORS, 1)}
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")
PROMOTION = jax.config.jax_numpy_dtype_promotion
STRICT = bool(os.environ.get("STOPGRAD_STRICT"))
FULL = bool(os.environ.get("STOPGRAD_FULL"))


def assert_cells(case, context, cells, dtype="float32"):
    """Check cells (tree, transform) of one case in one context, compiled together."""
    programs = {
        tree: Program(CASES[case], CONTEXTS[context], tree, dtype) for tree in TREES
    }
    compiled, traced = [], []
    for tree, transform in cells:
        error = expected_error(case, context, transform, dtype)
        run = lambda p=programs[tree], transform=transform: p.jax(transform)
        if error:
            kind, words = ERRORS[error]
            with pytest.raises(kind, match=words):
                jax.jit(run).lower()
        elif "shard_map" in context and tree == "empty":
            # XLA fails on some second derivatives of empty shards, ours or not; of an
            # empty array the shape is all that there is to check.
            traced.append((tree, transform, jax.eval_shape(run)))
        else:
            compiled.append((tree, transform, run))
    results = jax.jit(lambda: [run() for *_, run in compiled])()
    pairs = zip(compiled, results, strict=True)
    traced += [(tree, transform, result) for (tree, transform, _), result in pairs]
    wrong = []
    for tree, transform, result in traced:
        expected = programs[tree].closed_form(transform)
        if not _agree(result, expected, dtype):
            wrong.append((tree, transform, result, expected))
    assert not wrong


def _agree(result, expected, dtype):
    if result.shape != expected.shape or result.dtype != dtype:
        return False
    if not result.size:
        return True
    # A few roundings of the largest entry: the others are differences of such.
    tolerance = 8 * float(jnp.finfo(dtype).eps) * max(1, np.abs(expected).max())
    got = np.asarray(result).astype(expected.dtype)
    return np.allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.skipif(STRICT, reason="the covering array below runs with the switches")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("case", CASES)
def test_float32(case, context):
    """Every function, context and transform, each with one of the trees in turn.

    With `STOPGRAD_FULL=1` the full product: 15 functions, 11 contexts, 11 transforms,
    5 trees.
    """
    every = list(itertools.product(TREES, TRANSFORMS))
    assert_cells(case, context, every if FULL else list(in_turn(case, context)))


def in_turn(case, context):
    """A tree for each transform: no function or context has one tree for all."""
    start = list(CASES).index(case) + list(CONTEXTS).index(context)
    for k, transform in enumerate(TRANSFORMS):
        yield list(TREES)[(start + k) % len(TREES)], transform


def test_in_turn_every_pair_with_a_tree_is_met():
    met = {
        (case, context, transform, tree)
        for case, context in itertools.product(CASES, CONTEXTS)
        for tree, transform in in_turn(case, context)
    }
    axes = (CASES, CONTEXTS, TRANSFORMS)
    assert {cell[:3] for cell in met} == set(itertools.product(*axes))
    for k, axis in enumerate(axes):
        pairs = {(cell[k], cell[3]) for cell in met}
        assert pairs == set(itertools.product(axis, TREES))


def covering(*axes):
    """Rows in which every pair of values of two axes occurs, greedily few."""
    missing = {
        (i, a, j, b)
        for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2)
        for a in one
        for b in other
    }
    count = len(missing)
    while missing:
        i, a, j, b = min(missing, key=str)
        row = [None] * len(axes)
        row[i], row[j] = a, b
        for k, axis in enumerate(axes):
            if row[k] is None:
                row[k] = max(axis, key=lambda v, k=k: _new(row, k, v, missing))
        pairs = itertools.combinations(enumerate(row), 2)
        missing -= {(i, a, j, b) for (i, a), (j, b) in pairs}
        yield tuple(row)
    assert count


def _new(row, k, value, missing):
    seen = [*row[:k], value, *row[k + 1 :]]
    pairs = itertools.combinations(enumerate(seen), 2)
    return sum((i, a, j, b) in missing for (i, a), (j, b) in pairs)


ROWS = sorted(covering(CASES, CONTEXTS, TRANSFORMS, TREES, DTYPES))


def test_the_covering_array_covers():
    axes = (CASES, CONTEXTS, TRANSFORMS, TREES, DTYPES)
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(itertools.product(one, other))


@pytest.mark.parametrize("case", CASES)
def test_other_dtypes(case):
    """Every pair of function, context, transform, tree and dtype, at least once."""
    rows = [row for row in ROWS if row[0] == case]
    for _, context, transform, tree, dtype in rows:
        # optax does not pass with strict promotion itself.
        promotion = "standard" if "optax" in case else PROMOTION
        with (
            jax.enable_x64(dtype == "float64" or jax.config.jax_enable_x64),
            jax.numpy_dtype_promotion(promotion),
        ):
            assert_cells(case, context, [(tree, transform)], dtype)


def page():
    """Write the support matrix."""
    lines = [
        "# Support matrix",
        "",
        "Written by `tests/test_conformance.py`, which checks each cell against a",
        "closed form, or against the error that is named: `make support-matrix`.",
        "",
        "Functions by transforms, in every context but `while`:",
        "",
        *_table(TRANSFORMS, lambda case, t: expected_error(case, "jit", t)),
        "",
        "In a `while` loop JAX has forward mode only:",
        "",
        *_table(TRANSFORMS, lambda case, t: expected_error(case, "while", t)),
        "",
        "Where it says no:",
        "",
        *(
            f"- {number}: {reason}."
            for reason, number in NUMBERS.items()
            if reason != NO_REMAT
        ),
        "",
        f"At complex64 `clip_gradient` is no ({NUMBERS[NO_ORDER]}) everywhere.",
        "",
        "Contexts: " + "; ".join(CONTEXTS) + ".",
        "",
        "Trees: " + ", ".join(TREES) + ". Dtypes: " + ", ".join(DTYPES) + ".",
        "",
        "`make test` checks every function, context and transform at float32, with one",
        "of the trees each, and every pair of values of any two of the five axes",
        f"({len(ROWS)} cells); `make support-matrix` the full product at float32.",
        "",
        "## Estimators",
        "",
        "`tests/test_estimators.py`: value, gradient and tangent of each agree with a",
        f"Python loop over the examples under {', '.join(estimator_cases.CONTEXTS)};",
        "bfloat16 and float16 stay what they are, and finite.",
        "",
        "| | modes |",
        "|---|---|",
        *(
            f"| `{name}` | {'both' if estimator_cases.has_forward(f) else 'reverse'} |"
            for name, f in estimator_cases.ESTIMATORS.items()
        ),
        "",
    ]
    return "\n".join(lines)


def _table(columns, error):
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for case in CASES:
        cells = [error(case, column) for column in columns]
        marks = [f"no ({NUMBERS[e]})" if e else "yes" for e in cells]
        yield f"| `{case}` | " + " | ".join(marks) + " |"


def test_the_page_is_this_matrix():
    assert PAGE.read_text() == page(), "stale: run `make support-matrix`"


if __name__ == "__main__":
    PAGE.write_text(page())
