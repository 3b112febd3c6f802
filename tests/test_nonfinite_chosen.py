"""A nan that the program chooses because of another nan: the other one is to blame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import stats
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
X = f32(0.5, 3.0)  # the first is below 1.2


def selected(x):
    z = jnp.sqrt(x - 1.2)
    return jnp.select([z < 1, z >= 1], [z, 2 * z], jnp.nan).sum()


def by_pieces(x):
    z = jnp.sqrt(x - 1.2)
    return jnp.piecewise(z, [z < 0, z >= 0], [jnp.sin, jnp.cos, jnp.nan]).sum()


def marked(x):
    z = jnp.sqrt(x - 1.2)
    return jnp.where(jnp.isnan(z), jnp.nan, x).sum()


def marked_by_a_branch(x):
    z = jnp.sqrt(x - 1.2)
    bad = jnp.isnan(z).any()
    return jax.lax.cond(bad, lambda: jnp.nan, lambda: jnp.sum(x))


def counted(x):
    z = jnp.sqrt(x - 1.2)
    few = jnp.sum(z > -1) < 2
    return jnp.where(few, jnp.nan, x.sum())


def with_bounds(x):
    z = jnp.sqrt(x - 1.2)
    return stats.uniform.logpdf(0.3, z, 2.0).sum()


def truncated(x):
    z = jnp.sqrt(x - 1.2)
    return stats.truncnorm.logpdf(x, -1.0, 2.0, loc=z).sum()


def jitted(x):
    z = jnp.sqrt(x - 1.2)
    return jax.jit(lambda z: jnp.select([z < 1, z >= 1], [z, -z], jnp.nan))(z).sum()


def in_a_loop(x):
    def body(total, x):
        z = jnp.sqrt(x - 1.2)
        return total + jnp.select([z < 1, z >= 1], [z, -z], jnp.nan), None

    return jax.lax.scan(body, jnp.float32(0.0), x)[0]


CHOSEN = [
    selected,
    by_pieces,
    marked,
    marked_by_a_branch,
    counted,
    with_bounds,
    truncated,
    jitted,
    in_a_loop,
]


@pytest.mark.parametrize("f", CHOSEN, ids=lambda f: f.__name__)
def test_what_was_compared_is_named(f):
    if f is with_bounds and jax.__version_info__ < (0, 11):
        pytest.skip("JAX gives -inf there")
    assert np.isnan(f(X))
    assert not np.isnan(f(X + 1))  # so it is the root, and no constant
    found = str(sg.find_nonfinite(f, ())(X))
    assert "nonfinite: return; nan is born forward, in sqrt" in found
    assert "z = jnp.sqrt(x - 1.2)" in found


def outside_of_its_domain(x):
    return jnp.where(x > 1, x, jnp.nan).sum()


def beside_another(x):
    """The logarithm is nan, and decides nothing."""
    z = jnp.log(x - 1.2)
    chosen = jnp.where(z > 0, x, 2 * x)
    return jnp.where(x > 1, chosen, jnp.nan).sum()


@pytest.mark.parametrize("f", [outside_of_its_domain, beside_another])
def test_a_constant_that_a_number_chooses_is_told_as_one(f):
    assert np.isnan(f(X))
    found = str(sg.find_nonfinite(f, ())(X))
    assert found.startswith("nonfinite: return; a constant of the function is nan")
    assert "jnp.where(x > 1" in found
