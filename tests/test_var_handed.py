"""Parameters of functions in which a derivative is taken, and calls that do nothing.

The oracle is the function with the change written by hand, or `jax.grad` of the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X, T = f32(0.3, -0.7, 1.1), f32(0.2, 0.4, -0.5)


def score(z, s):
    return jax.grad(lambda u: jnp.sum(s * u**2))(z)  # 2 s z


def scored(x, t):
    return jnp.sum(score(x, jnp.exp(t)))


def inner_step(w, batch):
    return w - 0.1 * jax.grad(lambda p: jnp.sum((p * batch - 1.0) ** 2))(w)


def adapted(x):
    return jnp.sum(inner_step(x * 0.5, jnp.sin(x)) ** 2)


def slope(u):
    return jax.grad(lambda v: jnp.sum(v**3 * u))(jnp.ones(3))  # 3 u


def sloped(x):
    return jnp.sum(slope(x * 2.0))


def penalty(critic, x):
    return jnp.sum((jnp.linalg.norm(jax.grad(critic)(x)) - 1.0) ** 2)


def penalized(x):
    return penalty(lambda x: jnp.sum(jnp.sin(x) * x), jnp.cos(x))


def in_a_scan(x):
    step = lambda c, t: (slope(c) * t, None)
    return jax.lax.scan(step, x, f32(1.0, 2.0))[0].sum()


def square(z):
    return jnp.sum(z**2 * jnp.sin(z))


def outer(x):
    return jnp.sum(jax.grad(lambda x: square(x * 2.0))(x))


def sum_of(f):
    return lambda *args: jnp.sum(f(*args))


BATCH = jax.grad(lambda b: jnp.sum(inner_step(X * 0.5, b) ** 2))
CRITIC = lambda x: jnp.sum(jnp.sin(x) * x)
SLOPES = {
    "score.s": (scored, (X, T), lambda: 2 * X),
    "score.z": (scored, (X, T), lambda: 2 * jnp.exp(T)),
    "inner_step.batch": (adapted, (X,), lambda: BATCH(jnp.sin(X))),
    "inner_step.w": (
        adapted,
        (X,),
        lambda: jax.grad(lambda w: jnp.sum(inner_step(w, jnp.sin(X)) ** 2))(X * 0.5),
    ),
    "slope.u": (sloped, (X,), lambda: f32(3.0, 3.0, 3.0)),
    "penalty.x": (
        penalized,
        (X,),
        lambda: jax.grad(lambda x: penalty(CRITIC, x))(jnp.cos(X)),
    ),
    "square.z": (
        outer,
        (X,),
        lambda: jax.grad(lambda z: jnp.sum(2.0 * jax.grad(square)(z)))(2.0 * X),
    ),
}


@pytest.mark.parametrize("label", SLOPES)
def test_a_parameter_that_an_inner_derivative_reads(label):
    f, args, expected = SLOPES[label]
    address = sg.var(label)
    np.testing.assert_allclose(sg.gradients(f, address)(*args), expected(), rtol=1e-5)
    sg.assert_gradient(f, address)(*args)
    assert sg.flow(f, xs=address)(*args).inputs[0].status == "flows"


def test_it_is_stopped_and_edited_where_it_is_handed_over():
    s, u = sg.var("score.s"), sg.var("slope.u")
    assert sg.gradients(scored, "t", stop_gradients=s)(X, T) is None
    np.testing.assert_allclose(
        sg.gradients(scored, "x", stop_gradients=s)(X, T), 2 * jnp.exp(T), rtol=1e-6
    )
    edited = sg.edit(sloped, {u: lambda u: u * 10.0})
    np.testing.assert_allclose(edited(X), 60.0 * X.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(edited)(X), f32(60.0, 60.0, 60.0), rtol=1e-6)
    with pytest.raises(ValueError, match="no derivative has been taken"):
        sg.edit(scored, {sg.var("score.z"): lambda z: z * 3.0})(X, T)


def test_in_each_round_of_a_scan():
    found = sg.capture(in_a_scan, sg.var("slope.u"))(X)[1][sg.var("slope.u")]
    np.testing.assert_allclose(found, jnp.stack([X, 3.0 * X]), rtol=1e-6)
    slopes = sg.gradients(in_a_scan, sg.var("slope.u"))(X)
    np.testing.assert_allclose(slopes, [[18.0] * 3, [6.0] * 3], rtol=1e-6)


def test_two_calls_that_are_handed_one_array_are_not_told_apart():
    def f(x):
        s = jnp.exp(x)
        return sum(jnp.sum(score(x * k, s)) for k in (1.0, 2.0))

    with pytest.raises(sg.AddressError, match="must be clear"):
        sg.gradients(f, sg.var("score.s"))(X)


def drop(x, train):
    if not train:
        return x
    return x * 2.0


def test_a_call_that_does_nothing_is_not_left_out():
    def f(x):
        return jnp.sum(drop(jnp.sin(x), True) * drop(jnp.cos(x), False))

    with pytest.raises(sg.AddressError, match="makes no operation is handed another"):
        sg.capture(f, sg.var("drop.x"))(X)


ALIKE = {
    "twice": (
        lambda x: jnp.sum(drop(jnp.sin(x), True) * drop(jnp.cos(x), True)),
        lambda x: [jnp.sin(x), jnp.cos(x)],
    ),
    "in the branch that runs": (
        lambda x: jax.lax.cond(
            x[0] > 0, lambda x: drop(x, True), lambda x: drop(x * 3.0, True), x
        ).sum(),
        lambda x: [0 * x, x],  # the branches in the order of `lax.switch`
    ),
    "in a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: drop(c, True), x).sum(),
        lambda x: [x, 2 * x, 4 * x],
    ),
    "jitted": (
        lambda x: jnp.sum(jax.jit(drop, static_argnums=1)(x, True)),
        lambda x: [x],
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_calls_that_all_do_something_are_found(name):
    f, expected = ALIKE[name]
    found = sg.capture(f, sg.var("drop.x"))(X)[1][sg.var("drop.x")]
    every = jnp.concatenate([jnp.reshape(h, (-1, 3)) for h in jax.tree.leaves(found)])
    np.testing.assert_allclose(every, jnp.stack(expected(X)), rtol=1e-6)


def named_as_in_numpy(a):
    return jnp.sum(jnp.sin(a) * 2)


def calls_it(w, x):
    return named_as_in_numpy(x @ w)


def assigns_what_is_outside(w, x):
    scale = jnp.sum(w**2)

    def loss(x):
        a = scale  # made outside
        a = a * jnp.sin(x)
        return jnp.sum(a)

    return sg.edit(loss, {sg.var("a", nth=-1): lambda a: 3 * a})(x)


@pytest.mark.parametrize(
    "around",
    [jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))],
    ids=["grad", "jit of grad", "grad of jit"],
)
def test_under_a_derivative_around_the_program(around):
    """NumPy's own functions are handed what that computes with, by the same name."""
    w, x = jnp.eye(3, dtype=jnp.float32), jnp.full((3, 3), 0.2, jnp.float32)
    edited = sg.edit(calls_it, {sg.var("named_as_in_numpy.a"): lambda a: 3 * a})
    expected = jax.grad(lambda w, x: jnp.sum(jnp.sin(3 * (x @ w)) * 2))(w, x)
    np.testing.assert_allclose(around(edited)(w, x), expected, rtol=1e-6)

    def captured(w, x):
        a = sg.var("named_as_in_numpy.a")
        return sg.capture(calls_it, a)(w, x)[1][a].sum()

    expected = jax.grad(lambda w, x: jnp.sum(x @ w))(w, x)
    np.testing.assert_allclose(around(captured)(w, x), expected, rtol=1e-6)

    def slope(w, x):
        return sg.gradients(calls_it, sg.var("named_as_in_numpy.a"))(w, x).sum()

    expected = jax.grad(lambda w, x: jnp.sum(2 * jnp.cos(x @ w)))(w, x)
    np.testing.assert_allclose(around(slope)(w, x), expected, rtol=1e-6)


def test_what_a_derivative_around_computes_with_is_assigned():
    w, x = jnp.eye(3, dtype=jnp.float32), jnp.full((3, 3), 0.2, jnp.float32)
    value, tangent = jax.jvp(lambda w: assigns_what_is_outside(w, x), (w,), (w,))
    np.testing.assert_allclose(value, 9 * jnp.sum(jnp.sin(x)), rtol=1e-6)
    np.testing.assert_allclose(tangent, 18 * jnp.sum(jnp.sin(x)), rtol=1e-6)
