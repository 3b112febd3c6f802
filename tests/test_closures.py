"""Rules that close over arrays made in their function, where that is run anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, -0.7, 1.2)
SLOPES = f32(1, 2, 3)
KINDS = ("jvp", "vjp", "gradient")


def doubled(kind, slopes):
    """Return `2 * a` elementwise, with a rule that says its slopes are others."""
    if kind == "gradient":
        return jax.custom_gradient(lambda a: (a * 2, lambda ct: ct * slopes))
    if kind == "jvp":
        g = jax.custom_jvp(lambda a: a * 2)
        g.defjvp(lambda p, t: (p[0] * 2, t[0] * slopes))
        return g
    g = jax.custom_vjp(lambda a: a * 2)
    g.defvjp(lambda a: (a * 2, None), lambda _, ct: (ct * slopes,))
    return g


def constant(kind):
    def f(x):
        return jnp.sum(doubled(kind, jnp.array([1.0, 2.0, 3.0]))(sg.name(x * 1, "h")))

    return f


def computed(kind):
    def f(x):
        slopes = jax.lax.stop_gradient(x) * 0 + SLOPES
        return jnp.sum(doubled(kind, slopes)(sg.name(x * 1, "h")))

    return f


def scanned(kind):
    """The rule lies in a loop, what it closes over around it."""

    def f(x):
        g, h = doubled(kind, jnp.array([1.0, 2.0, 3.0])), sg.name(x * 1, "h")
        return jnp.sum(jax.lax.scan(lambda c, _: (c + g(h) / 4, c), h * 0, None, 4)[0])

    return f


def branched(kind):
    def f(x):
        g, h = doubled(kind, jnp.array([1.0, 2.0, 3.0])), sg.name(x * 1, "h")
        return jnp.sum(jax.lax.cond(x[0] > 0, g, lambda a: a * 5, h))

    return f


PROGRAMS = {"constant": constant, "computed": computed, "scanned": scanned}
PROGRAMS |= {"branched": branched}
programs = pytest.mark.parametrize("program", PROGRAMS)
kinds = pytest.mark.parametrize("kind", KINDS)


def rewritten(fun):
    """The function run anew by each verb, and with nothing changed."""
    total = sg.op("reduce_sum")
    return {
        "capture": lambda x: sg.capture(fun, ["h"])(x)[0],
        "edit": sg.edit(fun, {"h": lambda h: h}),
        "edit elsewhere": sg.edit(fun, {total: lambda summed, *a: summed(*a)}),
        "perturb": lambda x: sg.perturb(fun, "h")({"h": jnp.zeros(3)}, x),
    }


@pytest.mark.parametrize("verb", ["capture", "edit", "edit elsewhere", "perturb"])
@programs
@kinds
def test_a_function_that_is_run_anew(program, kind, verb):
    fun = PROGRAMS[program](kind)
    again = rewritten(fun)[verb]
    np.testing.assert_allclose(again(X), 2 * jnp.sum(X), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(fun)(X), SLOPES, rtol=1e-6)
    np.testing.assert_allclose(sg.gradients(fun, "x")(X), SLOPES, rtol=1e-6)
    for grad in (jax.grad(again), jax.jit(jax.grad(again)), jax.grad(jax.jit(again))):
        with pytest.raises(TypeError) as caught:
            grad(X)
        said = " ".join(str(caught.value).split())
        assert verb.split()[0] + "(f, " in said
        assert "the rule of " in said
        assert "test_closures.py:" in said
        assert "which closes over a value of the function around it write: " in said


@programs
@kinds
def test_find_nonfinite_runs_such_a_rule_while_the_function_runs(program, kind):
    fun = PROGRAMS[program](kind)
    try:
        jax.jit(jax.grad(fun))(X)
    except TypeError:  # then JAX itself can only call it step by step
        with pytest.raises(TypeError) as caught:
            sg.find_nonfinite(fun)(X)
        said = " ".join(str(caught.value).split())
        assert (
            "at which jax.jit of the gradient raises write: sg.with_backward(" in said
        )
        assert (program, kind) == ("scanned", "vjp") or program == "branched"
        return
    assert sg.find_nonfinite(fun)(X) is None
    report = sg.find_nonfinite(lambda x: fun(jnp.log(x)))(f32(1, 0, 2))
    assert (report.direction, report.expression) == ("forward", "jnp.log(x)")
    rooted = lambda x: fun(jnp.where(x > 0, jnp.sqrt(x), 0.0))
    assert jnp.isnan(jax.grad(rooted)(f32(1, 0, 2))[1])
    report = sg.find_nonfinite(rooted)(f32(1, 0, 2))
    assert (report.direction, report.expression) == ("backward", "jnp.sqrt(x)")


@kinds
def test_find_nonfinite_of_a_rule_that_closes_over_what_moves(kind):
    fun = lambda x: jnp.sum(doubled(kind, x * 3)(x))
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(jax.grad(fun))(X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(fun)(X)
    with pytest.raises(TypeError) as caught:
        sg.find_nonfinite(fun)(X)
    said = " ".join(str(caught.value).split())
    assert "at which jax.jit of the gradient raises write: sg.with_backward(" in said
    assert sg.find_nonfinite(fun, xs=())(X) is None


@kinds
def test_what_is_closed_over_and_not_read_does_no_harm(kind):
    def f(x):
        held = {"slopes": SLOPES, "other": jnp.array([4.0, 5.0, 6.0])}
        slope = lambda ct: ct * held["slopes"]
        if kind == "jvp":
            g = jax.custom_jvp(lambda a: a * 2)
            g.defjvp(lambda p, t: (p[0] * 2, slope(t[0])))
        elif kind == "vjp":
            g = jax.custom_vjp(lambda a: a * 2)
            g.defvjp(lambda a: (a * 2, None), lambda _, ct: (slope(ct),))
        else:
            g = jax.custom_gradient(lambda a: (a * 2, slope))
        return jnp.sum(g(sg.name(x * 1, "h")))

    for again in rewritten(f).values():
        np.testing.assert_allclose(jax.grad(again)(X), SLOPES, rtol=1e-6)


@kinds
def test_what_belongs_to_a_trace_around_is_there_still(kind):
    def outer(x, slopes):
        f = lambda x: jnp.sum(doubled(kind, slopes)(sg.name(x * 1, "h")))
        return jax.grad(sg.edit(f, {"h": lambda h: h}))(x)

    np.testing.assert_allclose(jax.jit(outer)(X, SLOPES), SLOPES, rtol=1e-6)


@kinds
def test_no_derivative_passes_a_rule_that_nothing_moves(kind):
    fun = lambda x: constant(kind)(jax.lax.stop_gradient(x)) + jnp.sum(x)
    again = sg.edit(fun, {"h": lambda h: h * 2})
    np.testing.assert_allclose(jax.grad(again)(X), jnp.ones(3))


def test_what_the_error_says_to_write():
    def argument(x):
        slopes = jnp.array([1.0, 2.0, 3.0])
        back = lambda ct, out, a, slopes: (ct * slopes, None)
        g = sg.with_backward(lambda a, slopes: a * 2, back)
        return jnp.sum(g(sg.name(x * 1, "h"), slopes))

    outside = lambda x: jnp.sum(doubled("jvp", SLOPES)(sg.name(x * 1, "h")))
    for fun in (argument, outside):
        for again in rewritten(fun).values():
            np.testing.assert_allclose(jax.grad(again)(X), SLOPES, rtol=1e-6)
        np.testing.assert_allclose(sg.gradients(fun, "h")(X), SLOPES, rtol=1e-6)


def test_a_rule_that_closes_over_a_number():
    """What JAX takes for a literal is a constant, and no value of the trace."""

    def f(x):
        k = jnp.float32(2.0) * 1.0

        @jax.custom_vjp
        def g(a):
            return a * 2

        g.defvjp(lambda a: (g(a), None), lambda _, ct: (ct * k,))
        return jnp.sum(g(sg.name(x * 1.0, "h")))

    x = jnp.arange(3.0)
    for run in (lambda f: f, jax.jit):
        value, found = run(sg.capture(f, "h"))(x)
        assert (value, found["h"].tolist()) == (6.0, [0.0, 1.0, 2.0])
