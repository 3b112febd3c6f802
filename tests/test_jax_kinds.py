"""What `_jax/kinds.py` rests on, on every version of JAX that is supported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stopgrad_jax._jax as _jax
import stopgrad_jax._jax.errors as _jax_errors

# By the number of their operands; none of them is another function's name.
ENTRYWISE = {
    1: [
        *(lax.exp, lax.log, lax.sqrt, lax.rsqrt, lax.tanh, lax.neg, lax.abs, lax.cbrt),
        *(lax.lgamma, lax.digamma, lax.erf, lax.acos, lax.atanh, lax.logistic),
        lambda x: lax.integer_pow(x, -2),
        lambda x: lax.convert_element_type(x, jnp.float16),
        lambda x: lax.reduce_precision(x, 5, 10),
        lambda x: lax.clamp(0.25, x, 0.5),
        lax.stop_gradient,
    ],
    2: [
        *(lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.pow, lax.atan2, lax.max),
        *(lax.nextafter, lax.igamma, lax.zeta),
        lambda x, y: lax.select_n(x > y, x, y),
    ],
}
CASES = [(fun, n) for n, functions in ENTRYWISE.items() for fun in functions]
MATRIX = jnp.eye(2) + 0.25
NOT_ENTRYWISE = [
    *(lax.cumsum, lax.cumprod, lax.cummax, lax.cumlogsumexp, lax.sort),
    *(jnp.transpose, lax.linalg.cholesky, lax.linalg.lu, jnp.linalg.inv, jnp.fft.fft),
    *(jax.nn.softmax, jnp.flip, lambda x: x @ x, lambda x: jnp.roll(x, 1)),
    lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
    lambda x: lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x + x.T, x),
]


def equations(jaxpr):
    for eqn in _jax.opened(jaxpr)[0].eqns:
        inner = [e for j in _jax.inner_jaxprs(eqn) for e in equations(j)]
        is_call = eqn.primitive.name == "jit"
        yield from inner if is_call else [eqn]


@pytest.mark.parametrize(("fun", "count"), CASES)
def test_what_is_entrywise(fun, count):
    """The law: an entry of the result is what the entries alone give."""
    drawn = np.random.default_rng(0).uniform(0.1, 0.9, (2, 2, 3)).astype("float32")
    operands, out = drawn[:count], fun(*drawn[:count])
    for eqn in equations(jax.make_jaxpr(fun)(*operands)):
        assert _jax.is_entrywise(eqn.primitive), eqn.primitive
    for index in np.ndindex(2, 3):
        alone = fun(*[x[index] for x in operands])
        np.testing.assert_allclose(out[index], alone, rtol=1e-5)


@pytest.mark.parametrize("fun", NOT_ENTRYWISE)
def test_what_is_not_entrywise(fun):
    """The law does not hold: another entry is read, and the shape is the same."""
    out = jax.tree.leaves(fun(MATRIX))[0]
    assert out.shape == MATRIX.shape
    found = list(equations(jax.make_jaxpr(fun)(MATRIX)))
    assert not all(_jax.is_entrywise(eqn.primitive) for eqn in found)


@pytest.mark.parametrize("options", [{"static_argnums": 1}, {"static_argnames": "p"}])
def test_what_is_declared_static(options):
    fun = jax.jit(lambda x, p: x, **options)
    assert _jax.static_arguments(fun, (1.0, 2.0), {}) == ([False, True], {})
    assert _jax.static_arguments(fun, (1.0,), {"p": 2.0}) == ([False], {"p": True})
    with pytest.raises(ValueError, match="Non-hashable") as caught:
        jax.make_jaxpr(lambda p: fun(1.0, p))(2.0)
    assert _jax_errors.is_traced_static(caught.value)
    with pytest.raises(ValueError, match="Non-hashable") as caught:
        fun(1.0, np.ones(2))
    assert not _jax_errors.is_traced_static(caught.value)


def test_nothing_is_static_where_nothing_is_declared():
    none = ([False], {"p": False})
    assert _jax.static_arguments(jax.jit(lambda x, p: x), (1.0,), {"p": 2.0}) == none
    assert _jax.static_arguments(lambda x, p: x, (1.0,), {"p": 2.0}) == none
