"""What a solver rounds: more than its result's digits tell, and no wrong derivative.

The functions have known slopes, curvature and errors of up to three digits, at random.
"""

import numpy as np
import pytest

from stopgrad_jax._check.compare import _UNKNOWN, DISTANCES
from stopgrad_jax._check.judge import WRONG, judge
from stopgrad_jax._check.slope import Difference

DIGIT = 2 * float(np.finfo("float32").eps)
COUNT = 2000


def accused(factor, told):
    """How many derivatives are called wrong that are `told` times the right one."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(COUNT):
        slope, curve, third = rng.normal(size=3)
        differences = []
        for h in DISTANCES[4]:
            base, plus, minus = rng.uniform(-3 * DIGIT, 3 * DIGIT, 3)
            left = slope - curve * h + third * h**2 + (base - minus) / h
            right = slope + curve * h + third * h**2 + (plus - base) / h
            noise = factor * DIGIT / h
            differences.append(Difference(h, left, right, noise, DIGIT / h))
        verdict = judge(told * slope, differences, 1e-3, differences[0].noise)
        wrong += verdict.kind == WRONG
    return wrong


def test_a_right_derivative_of_what_a_solver_returns_is_not_accused():
    assert accused(_UNKNOWN, 1.0) == 0
    assert accused(1, 1.0) > 0  # as if its rounding were that of one operation


@pytest.mark.parametrize("told", [1.3, 0.5, -1.0])
def test_a_wrong_one_is(told):
    assert accused(_UNKNOWN, told) >= 0.99 * COUNT
