"""What a solver rounds: more than its result's digits tell, and no wrong derivative.

The functions have known slopes, curvature and errors of up to three digits, at random.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg
from stopgrad_jax._check.compare import _UNKNOWN, DISTANCES
from stopgrad_jax._check.judge import WRONG, judge
from stopgrad_jax._check.moved_copies import EVERY, INSIDE
from stopgrad_jax._check.rounding import Rounding
from stopgrad_jax._check.slope import Difference
from stopgrad_jax._check.sought import Reading

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


STOP = jax.lax.stop_gradient
TWELVE = jnp.arange(12.0)


def _gap(w):
    return jax.nn.log_softmax(STOP(w)) - jax.nn.log_softmax(w)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (lambda w: jnp.sum((w - 1.0) ** 2), jnp.ones(9)),
        (lambda w: jnp.mean((w - STOP(w)) ** 2), TWELVE + 0.5),
        (lambda w: jnp.mean((jnp.sin(w) - jnp.sin(STOP(w))) ** 2), TWELVE),
        (lambda w: (jnp.linalg.norm(w) - 1.0) ** 2, jnp.ones(9) / 3),
        (lambda w: jnp.sum(jax.nn.softmax(STOP(w)) * _gap(w)), TWELVE),
    ],
    ids=["square", "commitment", "distance", "norm", "kl"],
)
def test_a_loss_that_is_zero_where_its_gradient_is_passes(fun, x, x64):
    """Nothing but rounding is left: of the argument, which the loss turns at."""
    with jax.enable_x64(x64):
        sg.check_gradients(fun)(jnp.asarray(np.asarray(x), float))


def test_where_a_loss_is_zero_a_wrong_rule_is_still_named():
    @jax.custom_vjp
    def gap(w):
        return w - 1.0

    gap.defvjp(lambda w: (gap(w), None), lambda _, ct: (1.1 * ct,))
    with pytest.raises(AssertionError, match="the rule of gap"):
        sg.check_gradients(lambda w: jnp.sum(gap(w) ** 2))(jnp.linspace(0.9, 1.2, 9))


def test_a_kink_where_a_loss_is_zero_is_still_told():
    with pytest.raises(AssertionError, match="kink"):
        sg.check_gradients(lambda w: jnp.sum(jnp.abs(w - 1.0)))(jnp.ones(9))


# Loops that JAX differentiates forward only -------------------------------------------


def test_a_gate_in_a_while_loop_is_left_out_there():
    """In reverse the loop is looked into in one copy; what comes after it rounds."""

    def fun(x):
        clipped = lambda c: (c[0] + 1, jnp.sin(sg.clip_gradient(c[1], -1.0, 1.0)))
        held = jax.lax.stop_gradient(x)
        return x * jax.lax.while_loop(lambda c: c[0] < 2, clipped, (0, held))[1]

    x, moved = jnp.float32(0.3), jnp.float32(0.4)
    closed = jax.make_jaxpr(fun)(x)
    jaxpr, consts = closed.jaxpr, closed.consts
    rounded = Rounding({}, Reading(forward=False))

    def result(x, token):
        tokens = {EVERY: token, INSIDE: jnp.zeros(())}
        return rounded.run(jaxpr, consts, [[x], [moved]], tokens)[0][0]

    assert result(x, jnp.zeros(())) == fun(x)
    # The product alone is off by its last digit: the loop is behind the stop.
    digit = fun(x) * jnp.finfo(x.dtype).eps
    assert jax.grad(result, (0, 1))(x, jnp.zeros(()))[1] == digit
