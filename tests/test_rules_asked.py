"""Asking about a rule that is told what moves changes no later answer, nor JAX's own.

The oracle is the closed form of the derivative, of every order of questions about one
jitted function.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X, Y = f32(0.3, 1.2, -0.8), f32(2.3, 3.2, 1.2)


def quotient():
    @jax.custom_vjp
    def div(x, y):
        return x / y

    def forward(x, y):
        kept = {}
        if x.perturbed:
            kept["x"] = 1 / y.value
        if y.perturbed:
            kept["y"] = -x.value / y.value**2
        return x.value / y.value, kept

    def backward(kept, ct):
        return tuple(ct * kept[k] if k in kept else None for k in "xy")

    div.defvjp(forward, backward, symbolic_zeros=True)
    return div


def product():
    @jax.custom_vjp
    def mul(x, y):
        return x * y

    def forward(x, y):
        kept = x.value if y.perturbed else None, y.value if x.perturbed else None
        return x.value * y.value, kept

    def backward(kept, ct):
        x, y = kept
        return None if y is None else ct * y, None if x is None else ct * x

    mul.defvjp(forward, backward, symbolic_zeros=True)
    return mul


RULES = {"div": (quotient, (1 / Y, -X / Y**2)), "mul": (product, (Y, X))}
BOTH = (0, 1)
QUESTIONS = {
    "grad x": lambda f: (jax.grad(f, 0)(X, Y), None),
    "grad y": lambda f: (None, jax.grad(f, 1)(X, Y)),
    "grad": lambda f: jax.grad(f, BOTH)(X, Y),
    "gradients x": lambda f: (sg.gradients(f, "x")(X, Y), None),
    "gradients y": lambda f: (None, sg.gradients(f, "y")(X, Y)),
    "gradients": lambda f: sg.gradients(f, ["x", "y"])(X, Y),
    "flow y": lambda f: sg.flow(f, xs="y")(X, Y) and (None, None),
    "assert x": lambda f: (sg.assert_gradient(f, "x")(X, Y), None),
    "edited": lambda f: jax.grad(sg.edit(f, {"x": lambda x: x}), BOTH)(X, Y),
}


@pytest.mark.parametrize("first", QUESTIONS)
@pytest.mark.parametrize("name", RULES)
def test_no_question_changes_the_next_answer(name, first):
    make, slopes = RULES[name]
    for rest in itertools.permutations(["grad x", "gradients y", "gradients x"], 2):
        rule = make()
        f = jax.jit(lambda x, y, rule=rule: jnp.sum(rule(x, y)))
        for question in (first, *rest, "grad"):
            answers = QUESTIONS[question](f)
            for answer, slope in zip(answers, slopes, strict=True):
                if answer is not None:
                    np.testing.assert_allclose(answer, slope, rtol=1e-6)


LOOPS = {
    "scan": lambda mul, x, y: jax.lax.scan(
        lambda c, _: (mul(c, y), None), x, None, length=3
    )[0],
    "fori": lambda mul, x, y: jax.lax.fori_loop(0, 3, lambda _, c: mul(c, y), x),
    "named": lambda mul, x, y: jax.lax.fori_loop(
        0, 3, lambda _, c: sg.name(mul(c, y), "h"), x
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_in_a_loop(loop):
    mul = product()
    f = lambda x, y: jnp.sum(LOOPS[loop](mul, x, y))
    slopes = {"y": 3 * X * Y**2, "x": Y**3}
    for asked in ("y", "x", "y"):
        found = sg.gradients(f, asked)(X, Y)
        np.testing.assert_allclose(found, slopes[asked], rtol=1e-5)
        stats = sg.gradient_stats(f, asked)(X, Y)[asked]
        np.testing.assert_allclose(stats.norm, np.linalg.norm(slopes[asked]), rtol=1e-5)
    assert [row.status for row in sg.flow(f)(X, Y).inputs] == ["flows", "flows"]
    sg.check_gradients(f)(X, Y)
    assert sg.find_nonfinite(f)(X, Y) is None
