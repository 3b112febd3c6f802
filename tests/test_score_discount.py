"""`dice` as a function of its discount: a polynomial, from 0 to 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg


@pytest.mark.parametrize("discount", [0.0, 0.25, 1.0])
def test_derivatives_by_the_discount(discount, run):
    """Those of a polynomial, 0 included: dice is one in the discount."""
    costs = f32(3.0, 2.0, -4.0, 0.5)
    every = jnp.stack([costs, 2 * costs], 1)
    d = discount
    expected = [
        3 + 2 * d - 4 * d**2 + 0.5 * d**3,
        2 - 8 * d + 1.5 * d**2,
        -8 + 3 * d,
        3.0,
    ]
    total = run(lambda d: sg.score.dice(jnp.zeros(4), costs, discount=d))
    for order, value in enumerate(expected):
        f = total
        for k in range(order):
            f = jax.jacrev(f) if k % 2 else jax.jacfwd(f)
        np.testing.assert_allclose(f(d), value, rtol=1e-6)
        f = total
        for _ in range(order):
            f = jax.grad(f)
        np.testing.assert_allclose(f(d), value, rtol=1e-6)
    both = lambda d: sg.score.dice(jnp.zeros((4, 2)), every, discount=d)
    slopes = jax.vmap(jax.jacfwd(both))(f32(d, d))
    np.testing.assert_allclose(slopes[1], expected[1] * f32(1.0, 2.0), rtol=1e-6)
    logs = jax.grad(lambda d, x: sg.score.dice(x, costs, discount=d), 1)
    by_both = jax.jacfwd(logs)(d, jnp.zeros(4))  # of sums of d^s * costs[s] from t on
    terms = f32(0.0, 2.0, -8 * d, 1.5 * d**2)
    np.testing.assert_allclose(by_both, jnp.cumsum(terms[::-1])[::-1], rtol=1e-6)
