"""Every estimator means the same in every context, in both modes, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from estimator_cases import CONTEXTS, ESTIMATORS, X, has_forward, looped

pytestmark = pytest.mark.usefixtures("usual_settings")
# float32 sums in another order; all else is the same arithmetic
TOLERANCE = 16 * float(jnp.finfo("float32").eps)


def weighted(context, f):
    """A loss with another cotangent for each entry."""

    def loss(x):
        y = context(f, x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return loss


def answers(context, f, forward):
    """Value, gradient and, where it has one, tangent."""

    def all_of(x):
        (_, y), grad = jax.value_and_grad(weighted(context, f), has_aux=True)(x)
        tangent = jax.jvp(lambda x: context(f, x), (x,), (jnp.sin(x),))[1]
        return (y, grad, tangent) if forward else (y, grad)

    return all_of


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_meaning_everywhere(name):
    f = ESTIMATORS[name]
    forward = has_forward(f)
    expected = jax.jit(answers(looped, f, forward))(X)
    got = jax.jit(
        lambda x: {k: answers(c, f, forward)(x) for k, c in CONTEXTS.items()}
    )(X)
    for context, results in got.items():
        for ours, theirs in zip(results, expected, strict=True):
            scale = max(1.0, float(jnp.abs(theirs).max()))
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=context
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_narrow_floats_stay_narrow_and_finite(name, dtype):
    f, x = ESTIMATORS[name], X[0].astype(dtype)
    y, back = jax.vjp(f, x)
    (grad,) = back(jnp.ones_like(y))
    assert y.dtype == grad.dtype == dtype
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert np.isfinite(np.asarray(grad, np.float32)).all()
