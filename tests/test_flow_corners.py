"""A loop of no round, and the line of a rule that `jax.custom_gradient` wraps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, 1.2, -0.8)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_body_of_a_loop_of_no_round_is_not_run(length, around):
    def loop(x, y):
        step = lambda c, _: (c * y, None)
        return jax.lax.scan(step, x, None, length=length)[0].sum()

    def carries(x, y):
        step = lambda c, _: ((c[1], c[0]), c[0])
        (a, _), _ = jax.lax.scan(step, (x, y), None, length=length)
        return a.sum()

    # Which round a value is of is not told: of no round, nothing is.
    for fun in map(around, (loop, carries) if length == 0 else (loop,)):
        grads = jax.grad(fun, (0, 1))(X, 2 * X)
        expected = ["flows" if np.any(grad) else "unused" for grad in grads]
        assert [row.status for row in sg.flow(fun)(X, 2 * X).inputs] == expected
        found = sg.gradients(fun, ["x", "y"])(X, 2 * X)
        assert [grad is not None for grad in found] == [w == "flows" for w in expected]


def product(a, b):
    return a * b, lambda g: (g * b, jnp.zeros_like(b))


def test_the_rule_of_a_custom_gradient_has_the_line_of_the_user():
    other = lambda a, b: (jnp.sin(a) + b, lambda g: (g * jnp.cos(a), jnp.zeros_like(b)))
    for function in (product, other):
        rule, line = jax.custom_gradient(function), function.__code__.co_firstlineno
        loss = lambda x, y, rule=rule: rule(x, y).sum()
        assert not np.any(jax.grad(loss, 1)(X, X))
        (cut,) = sg.flow(loss)(X, X).cuts
        assert cut.inputs == ("y",)
        assert cut.words.endswith(f"returns zero (tests/test_flow_corners.py:{line})")
