"""Other people's derivative rules are asked exactly what `jax.grad` asks them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

LEVELS = jnp.float32([1.0, 2.0, 3.0])
X = jnp.float32([0.4, -0.7, 1.2])
# JAX's coming rules have a type of their own for it, which is not public.
COMING = getattr(jax.config, "jax_custom_vjp3", False)
CLOSED = (
    "CustomVJPException: Detected differentiation of a custom_vjp"
    if COMING
    else "UnexpectedTracerError: a custom rule closes over what"
)


def of_a_closure():
    """Expect what JAX raises for a rule that closes over what is differentiated."""
    if COMING:
        return pytest.raises(Exception, match=r"^Detected differentiation of a custom_")
    return pytest.raises(jax.errors.UnexpectedTracerError)


def times(function, rule):
    """Give a function of one array a custom_vjp with this derivative."""
    f = jax.custom_vjp(function)
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * rule(x),))
    return f


def global_array():
    return times(lambda x: x**2 * LEVELS, lambda x: 2 * x * LEVELS)


def numpy_array():
    table = np.array([1.0, 2.0, 3.0], np.float32)
    return times(lambda x: x**2 * table, lambda x: 2 * x * table)


def numpy_scalar():
    threshold = np.float32(0.5)
    return times(lambda x: x**2 * threshold, lambda x: 2 * x * threshold)


def jax_scalar():
    threshold = jnp.float32(0.5)
    return times(lambda x: x**2 * threshold, lambda x: 2 * x * threshold)


def several_arrays():
    a, b = jnp.arange(1.0, 4.0), np.ones(3, np.float32)
    return times(lambda x: x**2 * a + b, lambda x: 2 * x * a)


def integers_beside():
    which = jnp.array([2, 0, 1])
    return times(lambda x: x[which] ** 2 * LEVELS, lambda x: 2 * x * LEVELS[which_of()])


def which_of():
    return jnp.argsort(jnp.array([2, 0, 1]))


def nondiff_array():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def f(scale, x):
        return x**2 * jnp.asarray(scale)

    f.defvjp(
        lambda scale, x: (f(scale, x), x), lambda scale, x, ct: (2 * x * ct * scale[0],)
    )
    return lambda x: f((2.0,), x)


def jvp_with_array():
    @jax.custom_jvp
    def f(x):
        return x**2 * LEVELS

    f.defjvp(lambda p, t: (f(*p), 2 * p[0] * LEVELS * t[0]))
    return f


def key_inside():
    noise = jax.random.normal(jax.random.key(0), (3,))
    return times(lambda x: x**2 * noise, lambda x: 2 * x * noise)


CONSTANTS = [
    global_array,
    numpy_array,
    numpy_scalar,
    jax_scalar,
    several_arrays,
    integers_beside,
    nondiff_array,
    jvp_with_array,
    key_inside,
]


def in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c) * 0.5, None), x, None, length=2)[0]


def in_cond(f):
    return lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x)


CONTEXTS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "scan": in_scan,
    "checkpoint": jax.checkpoint,
    "cond": in_cond,
    "jit-scan-checkpoint": lambda f: jax.jit(in_scan(jax.checkpoint(f))),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda f: f.__name__)
def test_constants_in_a_rule(constant, context):
    f = CONTEXTS[context](constant())

    def loss(x):
        return jnp.sum(f(x))

    (row,) = sg.flow(loss)(X).inputs
    assert row.status == "flows"
    sg.assert_gradient(loss, "x")(X)
    expected = jax.grad(loss)(X)
    np.testing.assert_array_equal(sg.gradients(loss, "x")(X), expected)
    assert "get" in str(sg.flow(loss)(X).explain("x"))


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda f: f.__name__)
def test_check_and_statistics_with_constants(constant):
    f = constant()

    def loss(x):
        return jnp.sum(f(x))

    sg.check_gradients(loss)(X)
    stats = sg.gradient_stats(loss, "x")(X)["x"]
    np.testing.assert_allclose(
        stats.norm, jnp.linalg.norm(jax.grad(loss)(X)), rtol=1e-6
    )


def test_a_constant_that_is_differentiated_is_refused_as_jax_does():
    def loss(c, x):
        @jax.custom_vjp
        def g(x):
            return x * c

        g.defvjp(lambda x: (x * 2.0, None), lambda _, ct: (ct,))
        return g(x)

    with of_a_closure():
        jax.grad(loss)(2.0, 3.0)
    flow = sg.flow(loss)(2.0, 3.0)
    assert [row.status for row in flow.inputs] == ["unknown", "flows"]
    words = str(flow.explain("c"))
    assert "jax.grad raises at g (" in words
    assert CLOSED in words
    for check in (sg.assert_gradient, sg.assert_no_gradient):
        with pytest.raises(AssertionError, match=r"jax\.grad raises at g"):
            check(loss, "c")(2.0, 3.0)
    assert sg.gradients(loss, "x")(2.0, 3.0) == 1.0


# Symbolic zeros -----------------------------------------------------------------------


def strict(forbidden, outputs=1):
    """Make a product of two whose rule raises if some argument is differentiated."""

    @jax.custom_vjp
    def g(x, c):
        return x * x * c if outputs == 1 else (x * x * c, x + c)

    def forward(x, c):
        for argument, name in ((x, "x"), (c, "c")):
            if argument.perturbed and name in forbidden:
                raise TypeError(f"{name} must not be differentiated")
        x, c = x.value, c.value
        return g(x, c), (x, c)

    def backward(residuals, ct):
        x, c = residuals
        if outputs == 2:
            ct, other = ct
            if type(other) is not jax.custom_derivatives.SymbolicZero:
                raise TypeError("the second result must not be differentiated")
        return 2 * x * c * ct, x * x * ct

    g.defvjp(forward, backward, symbolic_zeros=True)
    return g


def by_data(g):
    return lambda w, x: g(w, x)


SYMBOLIC = {
    # c is computed from a constant, and from nothing that is differentiated
    "constant": lambda g: lambda w: g(w, jnp.sum(jnp.arange(3.0))),
    "stopped": lambda g: lambda w: g(w, jax.lax.stop_gradient(w) + 3.0),
    "rounded": lambda g: lambda w: g(w, jnp.round(w) + 3.0),
    "integer": lambda g: lambda w: g(w, w.astype(int).astype(float) + 3.0),
    "jit": lambda g: lambda w: jax.jit(g)(w, 3.0),
    "jit-inside": lambda g: jax.jit(lambda w: g(w, jnp.ones(()))),
    "scan-constant": lambda g: (
        lambda w: jax.lax.scan(lambda c, k: (g(c, k), None), w, jnp.arange(1.0, 3.0))[0]
    ),
    "scan-carry": lambda g: (
        lambda w: jax.lax.scan(
            lambda c, _: ((g(c[0], c[1]), c[1] * 2), None), (w, 1.0), None, length=2
        )[0][0]
    ),
    "cond": lambda g: (
        lambda w: jax.lax.cond(w > 0, lambda w, c: g(w, c), lambda w, c: w * c, w, 3.0)
    ),
    "checkpoint": lambda g: jax.checkpoint(lambda w: g(w, 3.0)),
    "vmap": lambda g: lambda w: jnp.sum(jax.vmap(g, (None, 0))(w, jnp.arange(3.0))),
    "inner-rule": lambda g: lambda w: g(w, sg.straight_through(jnp.round)(3.0)),
}


@pytest.mark.parametrize("case", SYMBOLIC)
def test_symbolic_zeros_are_those_of_jax(case):
    f = SYMBOLIC[case](strict("c"))
    expected = jax.grad(f)(1.3)
    np.testing.assert_array_equal(sg.gradients(f, "w")(1.3), expected)
    flow = sg.flow(f)(1.3)
    assert [row.status for row in flow.inputs] == ["flows"]
    sg.assert_gradient(f, "w")(1.3)
    stats = sg.gradient_stats(f, "w")(1.3)["w"]
    np.testing.assert_allclose(stats.norm, abs(expected), rtol=1e-6)


def test_each_argument_is_asked_for_alone():
    g = strict("c")
    flow = sg.flow(lambda w, c: g(w, c))(1.3, 2.0)
    assert [row.status for row in flow.inputs] == ["flows", "unknown"]
    words = str(flow.explain("c"))
    assert "jax.grad raises at g" in words
    assert "TypeError: c must not be differentiated" in words
    assert "can get a gradient" in str(flow.explain("w")).split("\n")[0]


def test_both_operands_by_one_argument_are_one_pattern():
    g = strict("c")
    flow = sg.flow(lambda w, c: g(w + c, c))(1.3, 2.0)
    assert [row.status for row in flow.inputs] == ["flows", "unknown"]
    with pytest.raises(TypeError, match="c must not be differentiated"):
        sg.gradients(lambda w, c: g(w + c, c), "c")(1.3, 2.0)


@pytest.mark.parametrize("sink", ["dropped", "stopped", "compared", "used"])
def test_a_rule_is_told_which_results_get_a_gradient(sink):
    g = strict("", outputs=2)
    use = {
        "dropped": lambda a, b: a,
        "stopped": lambda a, b: a * jax.lax.stop_gradient(b),
        "compared": lambda a, b: a * (b > 0),
        "used": lambda a, b: a * b,
    }[sink]

    def loss(w, c):
        return use(*g(w, c))

    flow = sg.flow(loss)(1.3, 2.0)
    statuses = [row.status for row in flow.inputs]
    if sink == "used":
        with pytest.raises(TypeError, match="second result"):
            jax.grad(loss)(1.3, 2.0)
        assert statuses == ["unknown", "unknown"]
    else:
        assert statuses == ["flows", "flows"]
        expected = jax.grad(loss, (0, 1))(1.3, 2.0)
        found = sg.gradients(loss, ["w", "c"])(1.3, 2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_rule_that_returns_symbolic_zeros():
    @functools.partial(jax.custom_jvp, nondiff_argnums=())
    def f(x, y):
        return x * 2.0, y * 3.0

    def rule(primals, tangents):
        (x, y), (x_dot, y_dot) = primals, tangents
        zero = jax.custom_derivatives.SymbolicZero
        assert type(y_dot) is zero
        return f(x, y), (x_dot * 2.0, y_dot)

    f.defjvp(rule, symbolic_zeros=True)

    def loss(w):
        a, b = f(w, 2.0)
        return a + b

    assert sg.gradients(loss, "w")(1.0) == jax.grad(loss)(1.0) == 2.0
    assert [row.status for row in sg.flow(loss)(1.0).inputs] == ["flows"]


# What is not on the way ---------------------------------------------------------------


def test_a_rule_that_is_not_on_the_way_is_not_asked():
    asked = []

    @jax.custom_vjp
    def broken(x):
        return x * 2.0

    def backward(_, ct):
        asked.append(ct)
        raise RuntimeError("must not be needed")

    broken.defvjp(lambda x: (broken(x), None), backward)

    def loss(w, data):
        metric = broken(data)
        return w * 3.0 + jax.lax.stop_gradient(metric), metric

    def train(w, data):
        return loss(w, data)[0]

    assert sg.gradients(train, "w")(1.0, 2.0) == 3.0
    assert sg.gradients(loss, "w", ys="return/0")(1.0, 2.0) == 3.0
    assert sg.gradient_stats(loss, "w", ys="return/0")(1.0, 2.0)["w"].norm == 3.0
    sg.assert_gradient(loss, "w", ys="return/0")(1.0, 2.0)
    assert sg.flow(loss, xs="w", ys="return/0")(1.0, 2.0).inputs[0].status == "flows"
    assert not asked


# Rules that close over what is traced -------------------------------------------------


def closing_over(w, data):
    @jax.custom_vjp
    def f(w):
        return w * data

    f.defvjp(lambda w: (f(w), None), lambda _, ct: (ct * data,))
    return f(w)


def closing_over_a_sum(w, data):
    shifted = data + 1.0  # traced in our trace, known to `jax.grad`
    table = {"shift": shifted}

    @jax.custom_jvp
    def f(w):
        return w * table["shift"]

    f.defjvp(lambda p, t: (f(*p), t[0] * table["shift"]))
    return f(w)


def closing_over_in_scan(w, data):
    def body(c, _):
        return closing_over(c, data), None

    return jax.lax.scan(body, w, None, length=2)[0]


CLOSING = [closing_over, closing_over_a_sum]


@pytest.mark.parametrize("f", CLOSING, ids=lambda f: f.__name__)
def test_a_rule_that_closes_over_data(f, run):
    expected = run(jax.grad(f))(2.0, 3.0)
    assert run(sg.gradients(f, "w"))(2.0, 3.0) == expected
    value, gradient = run(sg.value_and_gradients(f, {"w": "w"}))(2.0, 3.0)
    assert (value, gradient["w"]) == (f(2.0, 3.0), expected)
    stats = run(sg.gradient_stats(f, "w"))(2.0, 3.0)["w"]
    np.testing.assert_allclose(stats.norm, expected, rtol=1e-6)
    sg.assert_gradient(f, "w")(2.0, 3.0)
    assert sg.flow(f, xs="w")(2.0, 3.0).inputs[0].status == "flows"


def test_a_rule_in_a_loop_that_closes_over_data():
    expected = jax.grad(closing_over_in_scan)(2.0, 3.0)  # JAX fails there when jitted
    assert sg.gradients(closing_over_in_scan, "w")(2.0, 3.0) == expected


def test_a_rule_that_closes_over_what_is_differentiated():
    with of_a_closure():
        jax.grad(closing_over, (0, 1))(2.0, 3.0)
    with pytest.raises(TypeError, match="closes over") as caught:
        sg.gradients(closing_over, ["w", "data"])(2.0, 3.0)
    assert "write: sg.with_backward(" in str(caught.value)
    named = lambda w, data: closing_over(sg.name(w, "h"), data)
    with pytest.raises(TypeError, match="closes over"):
        sg.gradients(named, "h")(2.0, 3.0)

    def mended(w, data):
        f = sg.with_backward(
            lambda w, data: w * data, lambda ct, out, w, data: (ct * data, ct * w)
        )
        return f(w, data)

    assert sg.gradients(mended, ["w", "data"])(2.0, 3.0) == [3.0, 2.0]


# A loop without reverse mode ----------------------------------------------------------


def grown(w, n):
    return jax.lax.fori_loop(0, n, lambda i, x: x * w, 1.0)


def until(w, n):
    return jax.lax.while_loop(lambda x: x < n, lambda x: x * w, w)


@pytest.mark.parametrize("f", [grown, until], ids=lambda f: f.__name__)
@pytest.mark.parametrize("verb", [sg.gradients, sg.value_and_gradients])
def test_a_loop_without_reverse_mode_is_named(f, verb):
    with pytest.raises(ValueError, match="known number of steps") as caught:
        verb(lambda w: f(w, jnp.int32(3)), "w")(2.0)
    line = f.__code__.co_firstlineno + 1
    assert f"test_rules.py:{line}" in str(caught.value)
    words = str(sg.flow(lambda w: f(w, jnp.int32(3)))(2.0).explain("w"))
    assert "jax.grad raises at" in words
    assert f"test_rules.py:{line}" in words


def test_a_loop_that_no_gradient_passes_is_no_hindrance():
    def f(w):
        steps = jax.lax.while_loop(lambda x: x < 10, lambda x: x + 1, w.astype(int))
        return w * steps

    assert sg.gradients(f, "w")(jnp.float32(2.0)) == 10.0
    assert sg.flow(f)(jnp.float32(2.0)).inputs[0].status == "flows"
