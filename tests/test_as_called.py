"""Without `jit`, a function of JAX runs as a whole, and so it does in every verb.

`x * mask` is a selection there: XLA sees the booleans. What it hides, a program run
operation by operation would show.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

KEEP = np.array([True, True, False])


def perplexity(x, y):
    logits = jnp.where(KEEP, x, -jnp.inf)
    masked = jax.nn.log_softmax(logits) * (jnp.arange(3) == y)
    return jnp.exp(-jnp.sum(masked))


def clipped(x, y):
    masked = jnp.exp(100 * x) * (x < y)
    return jnp.sum(masked)


def swapped(x, y):
    masked = (x < y) * jnp.exp(100 * x)
    return jnp.sum(masked**2)


def updated(x, y):
    masked = jnp.exp(100 * x)
    masked *= x < y
    return jnp.mean(masked)


def long(x, y):
    """The two operations are the 64th and the 65th."""
    z = x
    for _ in range(60):
        z = z + 1e-3
    masked = jnp.exp(100 * z) * (x < y)
    return jnp.sum(masked)


PROGRAMS = [perplexity, clipped, swapped, updated, long]
ARGUMENTS = f32(0.1, 0.2, 3.0), 1


@pytest.fixture(params=PROGRAMS, ids=lambda f: f.__name__)
def f(request):
    value = request.param(*ARGUMENTS)
    assert np.isfinite(value)
    return request.param


def same_for(address):
    if address == sg.op("mul"):
        return lambda mul, *operands: mul(*operands)
    return lambda value: value


VERBS = {
    "gradients": lambda f, a: sg.value_and_gradients(f, a)(*ARGUMENTS)[0],
    "capture": lambda f, a: sg.capture(f, a)(*ARGUMENTS)[0],
    "edit": lambda f, a: sg.edit(f, {a: same_for(a)})(*ARGUMENTS),
}


@pytest.mark.parametrize(
    "address", ["x", sg.var("masked", nth=0), sg.op("mul")], ids=str
)
@pytest.mark.parametrize("verb", VERBS)
def test_the_value_is_that_of_the_function(f, verb, address):
    if f is updated and address == sg.var("masked", nth=0):
        address = sg.var("masked", nth=1)
    np.testing.assert_array_equal(VERBS[verb](f, address), f(*ARGUMENTS))


def test_so_are_its_gradients(f):
    expected = jax.grad(f)(*ARGUMENTS)
    np.testing.assert_array_equal(sg.gradients(f, "x")(*ARGUMENTS), expected)
    edited = jax.grad(sg.edit(f, {sg.op("mul"): lambda mul, *a: mul(*a)}))
    np.testing.assert_array_equal(edited(*ARGUMENTS), expected)
    zero = {"x": jnp.zeros(3)}
    moved = jax.grad(sg.perturb(f, "x"))(zero, *ARGUMENTS)["x"]
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("around", [jax.vmap, jax.jit, jax.hessian, jax.jvp])
def test_so_it_is_in_transforms(around):
    f = functools.partial(clipped, y=1.0)
    edited = sg.edit(f, {sg.var("masked"): lambda v: v})
    x = f32(0.1, 0.2, 3.0)
    if around is jax.jvp:
        results = [jax.jvp(g, (x,), (x,)) for g in (edited, f)]
    else:
        results = [around(g)(x) for g in (edited, f)]
    np.testing.assert_array_equal(*map(np.asarray, results))


def test_a_cast_that_the_user_wrote_is_multiplied_by():
    def f(x, keep):
        keep = keep.astype(x.dtype)
        return jnp.sum(x * keep)

    x, keep = f32(np.inf, 1.0), np.array([False, True])
    assert np.isnan(f(x, keep))
    assert np.isnan(sg.edit(f, {"x": lambda v: v})(x, keep))


def test_what_was_put_in_the_place_of_the_mask_is_multiplied_by():
    halved = sg.edit(
        lambda x, m: x * m, {sg.op("mul"): lambda mul, x, m: mul(x, m / 2)}
    )
    assert halved(2.0, np.array(True)) == 1.0


def log_of_masked(x, keep):
    return jnp.sum(jnp.log(x) * keep)


def test_a_finite_value_is_not_called_nonfinite(f):
    assert sg.find_nonfinite(f, ())(*ARGUMENTS) is None


def test_the_gradient_is_found_that_the_value_hides():
    arguments = f32(0.0, 1.0), np.array([False, True])
    assert log_of_masked(*arguments) == 0.0
    assert np.isnan(jax.grad(log_of_masked)(*arguments)[0])
    found = str(sg.find_nonfinite(log_of_masked)(*arguments))
    assert found.startswith(
        "nonfinite: the gradient of x; nan is born backward, in div"
    )


def test_nothing_is_called_in_what_is_compiled():
    """Under `jit` the program has the operations that the function has."""
    edited = sg.edit(clipped, {sg.var("masked"): lambda v: v})
    programs = [str(jax.make_jaxpr(g)(*ARGUMENTS)) for g in (edited, clipped)]
    assert [p.count("multiply") for p in programs] == [0, 0]


def by_hand(w):
    z = w * (w > 0)
    return jnp.sum(jnp.where(z > 0, jnp.sqrt(z), 0.0))


def normalized(w):
    mask = w > 0
    h = w * mask
    return jnp.sum(jnp.where(mask, h / jnp.sqrt(jnp.sum(h * h)) + jnp.log(h), 0.0))


def weighed_twice(w):
    return jnp.sum(jnp.sqrt(w * (w > 0)) * (w > 0))


@pytest.mark.parametrize("f", [by_hand, normalized, weighed_twice])
def test_a_product_of_a_derivative_is_no_such_call(f):
    """Without `jit` the gradient is nan, and it is found."""
    w = f32(1.0, -1.0)
    assert np.isfinite(f(w))
    assert np.isnan(jax.grad(f)(w)[1])
    assert sg.find_nonfinite(f)(w) is not None
