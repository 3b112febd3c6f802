"""Rules that raise where no gradient flows: JAX runs them all the same.

In code whose results nobody reads, and where a zero is handed on as a tangent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
RAISED = "y must not be differentiated"


def by_its_first():
    """Make the rule anew: where it has raised, JAX keeps what makes it fail again."""

    @jax.custom_vjp
    def f(x, y):
        return jnp.cos(x) * y

    def forward(x, y):
        if y.perturbed:
            raise TypeError(RAISED)
        return f(x.value, y.value), (x.value, y.value)

    backward = lambda residuals, ct: (jnp.zeros(3), jnp.zeros(3))
    f.defvjp(forward, backward, symbolic_zeros=True)
    return f


def error_of(call):
    try:
        call()
    except TypeError as error:
        return str(error)
    return None


BEFORE = {
    "nothing": lambda x: x,
    "sine": jnp.sin,
    "jit": jax.jit(lambda x: jnp.sum(jnp.stack([x, x]), 0)),
    "stop": jax.lax.stop_gradient,
    "round": jnp.round,
    "cast": lambda x: x.astype(jnp.int32).astype(x.dtype),
    "straight through": sg.straight_through(jnp.round),
    "remat": jax.checkpoint(jnp.tanh),
    "relu": jax.nn.relu,
    "logsumexp": lambda x: x - jax.nn.logsumexp(x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=2)[0],
    "cond": lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "vmap": lambda x: jax.vmap(jax.jit(jnp.sin))(x),
}
WITHIN = {
    "alone": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda x, y: jax.lax.cond(x[0] > -9, f, lambda x, y: x, x, y),
    "scan": lambda f: (
        lambda x, y: jax.lax.scan(lambda c, _: (f(c, y), None), x, None, length=2)[0]
    ),
}


def unknown_where_it_raises(made):
    """Return the statuses of the inputs, as `jax.grad` by each has confirmed them."""
    args = tuple(f32(0.1, 0.2, k) for k in range(3))
    flow = sg.flow(made())(*args)
    for k, row in enumerate(flow.inputs):
        raised = error_of(lambda k=k: jax.grad(made(), k)(*args))
        assert raised in (None, RAISED)
        assert (row.status == "unknown") == (raised is not None)
        assert raised is None or raised in str(flow.explain(row.path))
    return [row.status for row in flow.inputs]


EACH_IN_TWO = [
    (before, within)
    for k, before in enumerate(BEFORE)
    for within in ("alone", list(WITHIN)[1 + k % (len(WITHIN) - 1)])
]


@pytest.mark.parametrize(("before", "within"), EACH_IN_TWO)
def test_a_rule_that_raises_where_nothing_is_computed_from_it(before, within):
    """JAX runs it all the same, with what moves there."""
    used = BEFORE[before]

    def made():
        other = WITHIN[within](by_its_first())

        def fun(a, b, c):
            other(used(b * 0.5), used(a * c))
            other(used(a), jnp.ones(3))
            return jnp.sum(a) + jnp.sum(c)

        return fun

    statuses = unknown_where_it_raises(made)
    assert statuses[1] == "unused"
    assert {statuses[0], statuses[2]} <= {"flows", "unknown"}


def leaves_out(x, y):
    """A custom_jvp with a tangent of zeros by its second argument."""
    f = jax.custom_jvp(lambda x, y: x * y)
    f.defjvp(lambda xs, ts: (xs[0] * xs[1], ts[0] * xs[1]))
    return f(x, y)


def returns_zeros(x, y):
    f = jax.custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: (x * y, y), lambda y, ct: (ct * y, jnp.zeros_like(y)))
    return f(x, y)


ZEROS = {"custom_jvp": leaves_out, "custom_vjp": returns_zeros}


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("after", ["sine", "stop", "remat"])
@pytest.mark.parametrize("zeros", ZEROS)
def test_a_rule_that_raises_where_a_zero_is_a_tangent(zeros, after, within):
    """JAX takes the result of a custom_vjp to move, though nothing flows."""

    def made():
        strict = WITHIN[within](by_its_first())

        def fun(a, b, c):
            return jnp.sum(strict(a, BEFORE[after](ZEROS[zeros](b, c))))

        return fun

    unknown_where_it_raises(made)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
@pytest.mark.parametrize("zeros", ZEROS)
def test_a_loop_without_a_reverse_mode_where_a_zero_is_a_tangent(zeros, around):
    def fun(a, b):
        start = (0, jnp.sin(around(ZEROS[zeros])(a, b)))
        step = lambda c: (c[0] + 1, c[1] * 2.0)
        return jnp.sum(jax.lax.while_loop(lambda c: c[0] < 3, step, start)[1])

    flow = sg.flow(fun)(f32(1, 2), f32(3, 4))
    statuses = [row.status for row in flow.inputs]
    if zeros == "custom_vjp":
        assert statuses == ["unknown", "unknown"]
        with pytest.raises(ValueError, match="Reverse-mode"):
            jax.grad(fun, 1)(f32(1, 2), f32(3, 4))
    else:
        assert statuses == ["unknown", "cut"]
        assert not jax.grad(fun, 1)(f32(1, 2), f32(3, 4)).any()
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(fun, 0)(f32(1, 2), f32(3, 4))


def test_a_rule_without_a_transpose_is_unknown():
    """As of a dilated max-pool: JAX has its forward half alone."""

    def f(x, w):
        pooled = lax.reduce_window(
            x, -jnp.inf, lax.max, (2,), (1,), "VALID", window_dilation=(2,)
        )
        return jnp.sum(pooled) * w[0]

    x, w = f32(0.3, -0.7, 1.2), f32(1.0, 2.0)
    with pytest.raises(NotImplementedError):
        jax.grad(f)(x, w)
    status = {row.path: row.status for row in sg.flow(f)(x, w).inputs}
    assert status == {"x": "unknown", "w": "flows"}
    with pytest.raises(AssertionError, match=r"jax\.grad raises"):
        sg.assert_gradient(f, "x")(x, w)
    np.testing.assert_array_equal(sg.gradients(f, "w")(x, w), jax.grad(f, 1)(x, w))


@pytest.mark.parametrize("layers", [2, 9, 12])
def test_what_comes_to_a_rule_is_known_through_as_many_layers_as_there_are(layers):
    """Each layer keeps two values apart, if it is not told that the other's moves."""
    Zero = jax.custom_derivatives.SymbolicZero

    @jax.custom_vjp
    def layer(a, b):
        return jnp.sin(a), 2 * b

    def backward(a, cts):
        if type(cts[1]) is not Zero:
            return cts[1], cts[1]
        return cts[0] * jnp.cos(a), None

    layer.defvjp(
        lambda a, b: (layer(a.value, b.value), a.value), backward, symbolic_zeros=True
    )

    def f(a, b):
        for _ in range(layers):
            a, b = layer(a, b)
        return jnp.sum(a)

    x = jnp.asarray([0.3, -0.7], jnp.float32)
    assert np.any(jax.grad(f, 0)(x, x))
    assert not np.any(jax.grad(f, 1)(x, x))
    assert f(x, x) == f(x, x + 1)  # each layer is of both, and the output is not
    flow = sg.flow(f)(x, x)
    assert [row.status for row in flow.inputs] == ["flows", "unused"]
    sg.assert_no_gradient(f, "b", args=(x, x))
