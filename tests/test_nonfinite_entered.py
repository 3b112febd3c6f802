"""A nan that comes into a program whose body is nonfinite for most ordinary numbers.

It is born where it is in the same program written without the call.
"""

import jax
import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


def root(t):
    return jnp.sqrt(t - 2.0)


def masked(t):
    return jnp.where(t > 3.0, t, jnp.sqrt(t - 3.0))


AROUND = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit of jit": lambda f: jax.jit(jax.jit(f)),
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda t: jax.lax.cond(t == t, lambda t: t, f, t),
    "switch": lambda f: lambda t: jax.lax.switch(2, [jnp.sin, jnp.cos, f], t),
    "vmap": lambda f: lambda t: jax.jit(jax.vmap(f))(t[None])[0],
    "scan": lambda f: (
        lambda t: jax.lax.scan(lambda c, _: (f(c), None), t, None, length=2)[0]
    ),
    "fori": lambda f: lambda t: jax.lax.fori_loop(0, 2, lambda i, c: f(c), t),
}


@pytest.mark.parametrize("f", [root, masked], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", AROUND)
def test_it_is_born_in_front_of_the_call(name, f):
    around = AROUND[name](f)
    told = str(sg.find_nonfinite(lambda x: around(jnp.log(x)))(jnp.float32(-1.0)))
    assert "nan is born forward, in log" in told
    assert "log(-1.0) = nan" in told
    assert "sqrt(-" not in told


@pytest.mark.parametrize("name", AROUND)
def test_it_is_the_argument(name):
    around = AROUND[name](root)
    told = str(sg.find_nonfinite(lambda x: around(x))(jnp.float32(jnp.nan)))
    assert "x is nan when the function is called" in told


def test_a_birth_inside_is_still_one():
    inner = jax.jit(lambda t: jnp.log(t - 5.0) + t)
    told = str(sg.find_nonfinite(lambda x: inner(jnp.exp(x)))(jnp.float32(0.0)))
    assert "log(-4.0) = nan" in told


def test_the_first_step_of_a_loop():
    """10, then sqrt(10 - sqrt(10 ...)): the roots by hand, 1.778 - 5 in step 1."""

    def rounds(xs):
        def step(c, x):
            h = jnp.sqrt(c - x)
            return jnp.sqrt(h - x), None

        return jax.lax.scan(step, jnp.float32(10.0), xs)[0]

    told = str(sg.find_nonfinite(rounds, ())(f32(0.0, 5.0, 1.0)))
    assert "sqrt(-3.2217" in told
    assert "in step 1" in told
