"""Entries are told of operations that work entry by entry; and what makes 0 / 0."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import batching, mlir
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.nonfinite as _words

pytestmark = pytest.mark.usefixtures("usual_settings")
SQUARE = f32(1.0, 2e20, 3e20, 1.0).reshape(2, 2)
OVERFLOWS = _words.OVERFLOWS.format(dtype="float32")
BACK_OVERFLOWS = _words.BACK_OVERFLOWS.format(dtype="float32")


def told(fun, x, **options):
    """Return a report, its line of numbers and its hint."""
    report = sg.find_nonfinite(lambda x: fun(x), **options)(x)
    name = re.escape(report.primitive)
    (numbers,) = re.findall(rf"^  ({name}\(.*)$", str(report), re.MULTILINE)
    return report, numbers, report.hint


# Forward: an operation of arrays, and an operand of the shape of its result.
ARRAYS = {
    "product": (lambda x: x @ x, SQUARE, OVERFLOWS),
    "sums": (lambda x: jnp.cumsum(x), f32(2e38, 2e38, 1.0), OVERFLOWS),
    "sums, 2": (
        lambda x: lax.cumsum(x, 1),
        f32(2e38, 2e38, 1.0, 1.0).reshape(2, 2),
        OVERFLOWS,
    ),
    "products": (lambda x: jnp.cumprod(x), f32(3e38, 2.0), OVERFLOWS),
    "convolution": (
        lambda x: jnp.convolve(x, x, mode="same"),
        f32(1e20, 1e20, 1.0),
        OVERFLOWS,
    ),
    "transform": (
        lambda x: jnp.abs(jnp.fft.fft(x)),
        f32(2e38, 2e38, 1.0),
        _words.OVERFLOWS.format(dtype="complex64"),
    ),
    "factor": (
        lambda x: jnp.linalg.cholesky(x, symmetrize_input=False),
        f32(1.0, 2.0, 2.0, 1.0).reshape(2, 2),
        _words.OTHER.format(name="cholesky", dtype="float32"),
    ),
    "solution": (
        jnp.linalg.inv,
        jnp.ones((2, 2), "float32"),
        _words.SINGULAR.format(dtype="float32"),
    ),
}


@pytest.mark.parametrize(("fun", "x", "hint"), ARRAYS.values(), ids=ARRAYS)
def test_no_entry_is_told_of_an_operation_of_arrays(fun, x, hint):
    report, numbers, said = told(fun, x, xs=())
    assert report.operands[0].shape == report.result.shape
    assert numbers.startswith(f"{report.primitive}([")  # the array, not an entry
    assert said == hint


def test_an_array_that_is_long_is_told_by_its_range():
    x = f32(2e38, -3.0, 2e38, 1.0, 2.0)
    _, numbers, _ = told(lambda x: jnp.cumsum(x), x, xs=())
    assert numbers.startswith("cumsum(f32[5] from -3 to 2e+38) = inf at [2]")
    x = f32(jnp.nan, 5.0, -1.0, 2.0, 3.0)  # sorted, so nan is last
    _, numbers, _ = told(lambda x: jnp.sort(x)[4], x, xs=())
    assert "(f32[5] from -1 to 5 and nan) = nan" in numbers


@pytest.mark.parametrize("fun", [jnp.sort, jnp.flip, jnp.transpose])
def test_an_entry_that_was_moved_is_not_told_by_its_new_place(fun):
    x = f32(1.0, 5.0, jnp.inf, 2.0).reshape(2, 2)
    assert np.isfinite(x[0, 1])
    _, numbers, _ = told(fun, x, xs=())
    assert "[[1.0, 5.0], [inf, 2.0]]" in numbers


def test_an_operation_that_nobody_knows_is_not_entrywise():
    """Nor one whose batching rule is its own; one of JAX's rules tells that it is."""

    def made(name, function):
        primitive = jax.extend.core.Primitive(name)
        primitive.def_impl(function)
        primitive.def_abstract_eval(lambda x: x)
        lowered = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, lowered)
        return primitive

    mean = made("centered", lambda x: 1 / (x - jnp.mean(x)))
    each = made("inverse", lambda x: 1 / x)
    batching.defvectorized(each)
    _, numbers, _ = told(mean.bind, f32(1.0, 2.0, 3.0), xs=())
    assert numbers == "centered([1.0, 2.0, 3.0]) = inf at [1] of f32[3]"
    _, numbers, _ = told(each.bind, f32(1.0, 0.0, 3.0), xs=())
    assert numbers == "inverse(0.0) = inf at [1] of f32[3]"


def by_a_product(x):
    right, weights = jnp.full((2, 2), 1e20, "float32"), f32(0.0, 1e20, 1.0, 1.0)
    return jnp.sum((x @ right) * weights.reshape(2, 2))


def by_sums(x):
    return jnp.sum(jnp.cumsum(x) * f32(0.0, 1e38, 3e38))


def by_a_sum(x):
    return jnp.sum(x * 0.0 + f32(2e38, 0.0) * x + f32(2e38, 1.0) * x)


SMALL = jnp.full((2, 2), 1e-10, "float32")
BACK = [(by_a_product, SMALL), (by_sums, SMALL[0, 0] * jnp.ones(3))]
BACK += [(by_a_sum, SMALL[0])]


@pytest.mark.parametrize(("fun", "x"), BACK)
def test_what_comes_back_overflows(fun, x):
    """Every slope is finite: the derivative in float64 is beyond float32 alone."""
    assert np.isfinite(fun(x))
    assert not np.isfinite(jax.grad(fun)(x)).all()
    report, numbers, hint = told(fun, x)
    assert report.direction == "backward"
    assert hint == BACK_OVERFLOWS
    if report.primitive != "add_any":
        assert "([" in numbers


# Zero by zero -------------------------------------------------------------------------


def norm(x):
    return jnp.sqrt(jnp.sum(x * x))


def ruled(backward, fun=norm):
    """Give a function a rule of its own, by `jax.custom_vjp`."""
    made = jax.custom_vjp(fun)
    made.defvjp(lambda x: (fun(x), (x, fun(x))), lambda r, ct: (backward(ct, *r),))
    return made


def own(backward, fun=norm):
    """The same, by `with_backward`."""
    return sg.with_backward(fun, lambda ct, out, x: (backward(ct, x, out),))


def in_two_lines(ct, x, r):
    scaled = ct * x
    return scaled / r


def in_a_jit(ct, x, r):
    return jax.jit(lambda ct, x, r: ct * x / r)(ct, x, r)


def summed(ct, x, r):
    return jnp.broadcast_to(jnp.sum(ct * x) / r, x.shape)


def mended(ct, x, r):
    return jnp.where(r > 0, ct * x / jnp.where(r > 0, r, 1.0), 0.0)


CONTEXTS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: (
        lambda x: lax.scan(lambda c, _: (c + f(x), None), 0.0, None, 2)[0]
    ),
    "remat": jax.checkpoint,
    "twice": lambda f: lambda x: jnp.sum(jax.grad(f)(x)),
}
around = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
made = pytest.mark.parametrize("rule", [ruled, own])
ZERO = f32(0.0, 0.0)


@around
@made
@pytest.mark.parametrize("backward", [in_two_lines, in_a_jit, summed])
def test_a_rule_that_makes_zero_by_zero(backward, rule, context):
    """What comes back is 1: to mend the rule mends the gradient."""
    fun = context(lambda x: 1.0 + rule(backward)(x))
    xs = () if context is CONTEXTS["twice"] else None
    report = sg.find_nonfinite(fun, xs)(ZERO)
    assert (report.primitive, report.hint) == ("div", _words.ZERO_BY_ZERO)
    fixed = context(lambda x: 1.0 + rule(mended)(x))
    assert sg.find_nonfinite(fixed, xs)(ZERO) is None


@around
@made
@pytest.mark.parametrize(
    "scaled", [lambda ct, x, r: ct / r, lambda ct, x, r: -2 * ct / r]
)
def test_zero_that_comes_back(scaled, rule, context):
    """The slope is infinite, and what comes back is 0: mended before the call alone."""
    root = rule(scaled, jnp.sqrt)
    fun = context(lambda x: 1.0 + 0.0 * jnp.sum(root(x)))
    xs = () if context is CONTEXTS["twice"] else None
    report = sg.find_nonfinite(fun, xs)(ZERO)
    assert report.hint == _words.ZERO_COMES_BACK
    one = context(lambda x: 1.0 + jnp.sum(root(x)))  # then it is the slope itself
    report = sg.find_nonfinite(one, xs)(ZERO)
    assert report.hint == _words.SLOPE


@made
def test_a_rule_that_makes_zero_by_zero_of_a_zero(rule):
    """Both: then it is said what is true for any that comes back."""
    report = sg.find_nonfinite(lambda x: 0.0 * rule(in_two_lines)(x))(ZERO)
    assert report.hint == _words.ZERO_BY_ZERO


OTHER_RULES = {
    _words.LOG_OF_NEGATIVE: lambda ct, x, r: x * jnp.log(-ct),
    _words.ROOT_OF_NEGATIVE: lambda ct, x, r: x * jnp.sqrt(-ct),
    _words.OTHER.format(name="atanh", dtype="float32"): lambda ct, x, r: (
        x * jnp.arctanh(ct)
    ),
    _words.ZERO_BY_ZERO: lambda ct, x, r: (ct - 1) * x / (ct - 1),
    BACK_OVERFLOWS: lambda ct, x, r: x * ct * 1e30 * 1e30,
}


@made
@pytest.mark.parametrize("hint", OTHER_RULES)
def test_what_else_a_rule_does_with_what_comes_back(hint, rule):
    report = sg.find_nonfinite(rule(OTHER_RULES[hint]))(f32(1.0, 2.0))
    assert (report.direction, report.hint) == ("backward", hint)


def test_a_long_way_back_is_gone_once():
    """Each of many values is read twice: the ways back are 2 to the 60th."""

    def backward(ct, x, r):
        for _ in range(60):
            ct = ct + 0.5 * ct
        return ct / r

    report = sg.find_nonfinite(lambda x: 0.0 * jnp.sum(ruled(backward, jnp.sqrt)(x)))
    assert report(ZERO).hint == _words.ZERO_COMES_BACK
