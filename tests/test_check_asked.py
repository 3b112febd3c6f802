"""A rule is asked what `jax.grad` asks it, and answers to the name that is printed."""

import functools
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32, instructions
from solvers import solved, solved_by_rule, stopped_solve

import stopgrad_jax as sg

X = f32(0.4, -0.7, 1.2)
TABLE, LITERAL = f32(1, 2, 3), np.array([0.5, 1.5, 2.5], np.float32)
pytestmark = pytest.mark.usefixtures("usual_settings")


# Operands that `jax.grad` does not perturb --------------------------------------------


@jax.custom_vjp
def with_table(x):
    return x**2 * TABLE


with_table.defvjp(lambda x: (with_table(x), x), lambda x, ct: (2 * x * TABLE * ct,))


@jax.custom_vjp
def with_literal(x):
    return jnp.where(x > jnp.float32(0.1), x, 0) * LITERAL


with_literal.defvjp(
    lambda x: (with_literal(x), x), lambda x, ct: ((x > 0.1) * LITERAL * ct,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def with_array(x, c):
    return x * c


with_array.defvjp(lambda x, c: (x * c, None), lambda c, _, ct: (c * ct,))


@jax.custom_vjp
def symbolic(x, c):
    return x * x * c


def _forward(x, c):
    if c.perturbed:
        raise TypeError("c must not be differentiated")
    return x.value * x.value * c.value, (x.value, c.value)


symbolic.defvjp(
    _forward,
    lambda r, ct: (2 * r[0] * r[1] * ct, jnp.zeros_like(r[1])),
    symbolic_zeros=True,
)


@jax.custom_jvp
def symbolic_jvp(x, c):
    return jnp.sin(x) * c


@functools.partial(symbolic_jvp.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (x, c), (dx, dc) = primals, tangents
    if type(dc) is not jax.custom_derivatives.SymbolicZero:
        raise TypeError("c must not be differentiated")
    return symbolic_jvp(x, c), jnp.cos(x) * c * dx


@eqx.filter_custom_vjp
def filtered(x, c):
    return x * c


@filtered.def_fwd
def _(perturbed, x, c):
    return x * c, c


@filtered.def_bwd
def _(residuals, ct, perturbed, x, c):
    return ct * residuals


@eqx.filter_custom_jvp
def filtered_jvp(x, c):
    return x**2 * c


@filtered_jvp.def_jvp
def _(primals, tangents):
    (x, c), (dx, dc) = primals, tangents
    assert dc is None
    return x**2 * c, 2 * x * c * dx


def _ct_is_one(x):
    """A loss whose backward pass takes for granted that it is the last one."""

    @jax.custom_vjp
    def loss(x):
        return jnp.sum(x**2)

    loss.defvjp(lambda x: (loss(x), x), lambda x, ct: (2 * x,))
    return loss(x)


@jax.custom_vjp
def two_results(x, c):
    """The derivative of its second result, and by its second operand, is missing."""
    return jnp.sin(x), x**3 * c


two_results.defvjp(
    lambda x, c: (two_results(x, c), x), lambda x, cts: (jnp.cos(x) * cts[0], None)
)


@jax.custom_vjp
def impossible(x):
    return x


def _impossible(*_):
    raise TypeError("this backward pass cannot run")


impossible.defvjp(lambda x: (x, None), _impossible)
constant = lambda x: jnp.sum(jnp.arange(3.0))

ASKED = {
    "table": with_table,
    "literal": with_literal,
    "array": lambda x: with_array(x, TABLE),
    "jit": jax.jit(with_table),
    "vmap": jax.vmap(lambda x: with_array(x, np.float32(2.0))),
    "scan": lambda x: lax.scan(lambda c, _: (with_table(c), None), x, None, length=2)[
        0
    ],
    "cond": lambda x: lax.cond(x[0] > 0, with_table, with_literal, x),
    "remat": jax.checkpoint(with_table),
    "symbolic zeros": lambda x: symbolic(x, constant(x)),
    "of integers": lambda x: symbolic(x, jnp.argmax(x).astype(float)),
    "of a stop": lambda x: symbolic(x, lax.stop_gradient(x[0])),
    "in a scan": lambda x: lax.scan(lambda c, x: (c, symbolic(x, c)), constant(x), x)[
        1
    ],
    "symbolic jvp": lambda x: symbolic_jvp(x, constant(x)),
    "filtered": lambda x: filtered(x, constant(x)),
    "filtered jvp": lambda x: filtered_jvp(x, jnp.round(x)),
    "the last one": _ct_is_one,
    "one result": lambda x: two_results(x, 2.0)[0] * x,
    "stopped result": lambda x: sum(map(lax.stop_gradient, two_results(x, x))) * x,
    "on another branch": lambda x: x * lax.stop_gradient(impossible(x)),
    "unused": lambda x: (impossible(x), x**2)[1],
    "no way to it": lambda x: x * impossible(jnp.ones(3)),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_rule_is_asked_what_jax_asks(name):
    function = ASKED[name]
    jax.grad(lambda x: jnp.sum(function(x)))(X)  # JAX asks nothing that raises
    sg.check_gradients(function)(X)


@pytest.mark.parametrize("name", ["symbolic jvp", "filtered jvp"])
def test_in_forward_mode_too(name):
    sg.check_gradients(ASKED[name], modes=("fwd",))(X)


def test_a_result_that_counts_is_compared():
    with pytest.raises(AssertionError, match="the rule of two_results"):
        sg.check_gradients(lambda x: two_results(x, 2.0)[1])(X)
    with pytest.raises(AssertionError, match="the rule of two_results"):
        sg.check_gradients(lambda x, c: two_results(x, c)[1] + x)(X, X)


def test_a_scope_is_only_a_name():
    """The stops of `with_backward` were once told by the name of a scope."""

    def named(x):
        with jax.named_scope("with_backward"):
            return jnp.sum(x * lax.stop_gradient(x))

    sg.check_gradients(named, order=2, modes=("rev", "fwd"))(X)
    inner = lambda x: jnp.sum(x * lax.stop_gradient(x))
    backward = lambda ct, out, x: (ct * x,)  # what the stop inside declares
    for scope in ("with_backward", "jvp(x)", "transpose(x)"):
        with jax.named_scope(scope):
            sg.check_gradients(sg.with_backward(inner, backward))(X)


def test_the_stops_of_with_backward_compile_to_nothing():
    wrapped = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x),))
    for mine, plain in ((wrapped, jnp.sin), (jax.vmap(wrapped), jnp.sin)):
        assert instructions(mine, X) == instructions(plain, X)


# Names --------------------------------------------------------------------------------


@jax.custom_gradient
def half(x):
    return x * 1.0, lambda ct: (ct / 2,)


class Twice:
    def __call__(self, x):
        return 2 * x


def _custom(function):
    rule = jax.custom_vjp(function)
    rule.defvjp(lambda x: (function(x), None), lambda _, ct: (ct / 2,))
    return rule


@eqx.filter_custom_jvp
def doubled(x):
    return x**2


@doubled.def_jvp
def doubled_jvp(primals, tangents):
    return primals[0] ** 2, 4 * primals[0] * tangents[0]


@eqx.filter_custom_vjp
def tripled(x):
    return x**2


@tripled.def_fwd
def tripled_forward(perturbed, x):
    return x**2, x


@tripled.def_bwd
def tripled_backward(x, ct, perturbed, _):
    return 6 * x * ct


def _root(x, by=1.0):
    function = lambda y: y**2 - x
    newton = lambda f, y: lax.fori_loop(0, 20, lambda _, y: y - f(y) / (2 * y), y)
    return lax.custom_root(
        function, jnp.ones_like(x), newton, lambda g, y: by * y / g(jnp.ones_like(y))
    )


def _linear_solve(x, by=1.0):
    solve = lambda matvec, b: b / x
    return lax.custom_linear_solve(
        lambda y: by * x * y, x**2 + 1, solve, symmetric=True
    )


NAMED = {
    "custom_gradient": lambda x: half(x) ** 2,
    "jitted": jax.jit(lambda x: half(x) ** 2),
    "scanned": lambda x: lax.scan(lambda c, x: (c, half(x)), 0.0, x)[1],
    "remat": jax.checkpoint(lambda x: half(jnp.sin(x))),
    "lambda": _custom(lambda x: 2 * x),
    "partial": _custom(functools.partial(lambda a, x: a * x, 2.0)),
    "object": _custom(Twice()),
    "filtered jvp": doubled,
    "filtered vjp": tripled,
    "with_backward": sg.with_backward(jnp.sin, lambda ct, out, x: (ct,)),
    "of a lambda": sg.with_backward(lambda x: 2 * x, lambda ct, out, x: (ct,)),
    "root": lambda x: _root(jnp.abs(x) + 1, by=0.5),
    "linear solve": lambda x: _linear_solve(jnp.abs(x) + 1, by=2.0),
    "at a kink": lambda x: jax.nn.relu(x - X),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_printed_works_when_pasted(name):
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(NAMED[name])(X)
    message = str(caught.value)
    assert "is not the derivative of its function" in message
    (allow,) = re.findall(r"write: (allow=\[.*\]), if it differs on purpose", message)
    sg.check_gradients(NAMED[name], **eval(f"dict({allow})"))(X)


def test_the_function_inside_a_wrapper_is_named():
    for name, rule in (
        ("custom_gradient", "half"),
        ("filtered jvp", "doubled_jvp"),
        ("filtered vjp", "tripled"),
    ):
        with pytest.raises(AssertionError, match=rf'rule of {rule} \((.|\n)*"{rule}"'):
            sg.check_gradients(NAMED[name])(X)


def test_one_of_two_lambdas_is_allowed():
    one = _custom(lambda x: 2 * x)
    other = _custom(lambda x: 3 * x)
    both = lambda x: one(x) * other(x)
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(both)(X)
    (allow,) = re.findall(r"allow=\[\"(.*)\"\]", str(caught.value))
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(both, allow=[allow])(X)
    (second,) = re.findall(r"allow=\[\"(.*)\"\]", str(caught.value))
    assert second != allow
    sg.check_gradients(both, allow=[allow, second])(X)
    sg.check_gradients(both, allow=["<lambda>"])(X)


def test_right_roots_and_solutions_pass():
    for function in (_root, _linear_solve, solved):
        sg.check_gradients(lambda x, f=function: f(jnp.abs(x) + 1))(X)


# Draws --------------------------------------------------------------------------------


def test_draws_by_rejection_are_left_out_with_a_word():
    draw = lambda a: jax.random.gamma(jax.random.key(0), a) * a**2
    said = "random_gamma .*draws at random until it"
    with pytest.warns(UserWarning, match=said) as caught:
        sg.check_gradients(draw)(1.7)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sg.check_gradients(draw, allow=["random_gamma"])(1.7)
    wrong = lambda a: draw(_custom(jnp.sin)(a) + 2)
    with pytest.raises(AssertionError, match="the rule of sin"):
        sg.check_gradients(wrong, allow=["random_gamma"])(1.7)


def test_so_are_the_draws_of_others():
    """A sampler with a rule of its own, as in libraries of distributions."""

    @jax.custom_jvp
    def draw(a):
        def again(state):
            key, _ = jax.random.split(state[0])
            return key, jax.random.exponential(key) * a

        start = again((jax.random.key(3), a))
        return lax.while_loop(lambda s: s[1] > 1.0, again, start)[1]

    draw.defjvp(lambda p, t: (draw(*p), 0.3 * t[0]))
    with pytest.warns(UserWarning, match="draw .*its derivative is that of a dist"):
        sg.check_gradients(lambda a: draw(a) * a)(1.7)


# Stops that a rule takes care of ------------------------------------------------------

MATRIX = f32(2.0, 0.3, 0.2, 1.5).reshape(2, 2)
B = f32(1.0, -0.5)


@pytest.mark.parametrize("solve", [stopped_solve, solved_by_rule], ids=["own", "jvp"])
def test_what_a_rule_takes_care_of_is_no_stop(solve):
    for function in (
        lambda a, b: jnp.sum(solve(a, b) ** 2),
        jax.jit(solve),
        lambda a, b: lax.scan(lambda c, _: (solve(a, c), None), b, None, length=2)[0],
        lambda a, b: b * solve(a, lax.stop_gradient(b)),
    ):
        sg.check_gradients(function)(MATRIX, B)


def test_at_second_order_a_stopped_factor_may_be_missing():
    def both(solve):
        check = sg.check_gradients(lambda a: solve(a, B), order=2, modes=("rev", "fwd"))
        return lambda: check(MATRIX)

    both(stopped_solve)()
    # JAX drops the rule where the function is linear, and then nothing moves the
    # factor: half of the second derivative that `jnp.linalg.solve` has is not there.
    of = lambda solve: jax.hessian(lambda a: jnp.sum(solve(a, B)))(MATRIX)[0, 0]
    assert not np.allclose(of(solved_by_rule), of(jnp.linalg.solve), rtol=0.1)
    with pytest.raises(AssertionError, match="second order"):
        both(solved_by_rule)()


def test_but_it_is_checked():
    for solve in (stopped_solve, solved_by_rule):
        with pytest.raises(AssertionError, match=r"the rule of .*by differences"):
            sg.check_gradients(functools.partial(solve, wrong=True))(MATRIX, B)


def test_stops_inside_a_rules_function_are_stops():
    @jax.custom_vjp
    def product(x):
        return x * lax.stop_gradient(x)

    product.defvjp(lambda x: (product(x), x), lambda x, ct: (ct * x,))
    sg.check_gradients(lambda x: product(jnp.sin(x)))(X)
    product.defvjp(lambda x: (product(x), x), lambda x, ct: (ct * 3 * x,))
    with pytest.raises(AssertionError, match="the rule of product"):
        sg.check_gradients(lambda x: product(jnp.sin(x)))(X)


def test_stops_where_nobody_gets_at_them():
    solve = lambda matvec, b: b / matvec(jnp.ones_like(b))
    matvec = lambda x, y: y * (x + lax.stop_gradient(x))
    function = lambda x: lax.custom_linear_solve(
        functools.partial(matvec, x), x**2, solve, solve, symmetric=True
    )
    sg.check_gradients(lambda x: function(jnp.sin(x)) * x)(X)
