"""Programs shared by the tests, and helpers to read compiled ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec as P

import stopgrad_jax as sg


def f32(*values):
    return jnp.array(values, jnp.float32)


kept = []


def keep(x):
    """Return x, and remember it: what a variable of the test's program was."""
    kept.append(x)
    return x


def same(x):
    return x


def layer(w, x):
    """One layer with a named activation."""
    return jnp.sum(sg.name(jnp.tanh(x * w), "h") ** 2)


def mesh(n=4):
    return jax.make_mesh((n,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def _vmapped(w, x):
    return jnp.sum(jax.vmap(lambda x: sg.name(jnp.tanh(x * w), "h") ** 2)(x))


def _scanned(w, x):
    def step(total, x):
        return total + sg.name(jnp.tanh(x * w), "h") ** 2, None

    return jax.lax.scan(step, jnp.zeros((), x.dtype), x)[0]


def _mapped(w, x):
    return jnp.sum(jax.lax.map(lambda x: sg.name(jnp.tanh(x * w), "h") ** 2, x))


def _looped(w, x):
    def step(i, total):
        return total + sg.name(jnp.tanh(x[i] * w), "h") ** 2

    return jax.lax.fori_loop(0, x.shape[0], step, jnp.zeros((), x.dtype))


def _sharded(w, x):
    def part(w, x):
        return jax.lax.psum(layer(w, x), "d")

    return jax.shard_map(part, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P())(w, x)


def _unchecked(w, x):
    def part(w, x):
        return jax.lax.psum(layer(w, x), "d")

    return jax.shard_map(
        part, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P(), check_vma=False
    )(w, x)


# One function of (w: scalar, x: 4 values) in all the ways JAX has to write it. In each,
# "h" is tanh(x * w) and the result the sum of its squares.
EVERYWHERE = {
    "plain": layer,
    "jit": jax.jit(layer),
    "nested jit": jax.jit(lambda w, x: jax.jit(layer)(w, x)),
    "remat": jax.checkpoint(layer),
    "remat, policy": jax.checkpoint(
        layer, policy=jax.checkpoint_policies.save_only_these_names("h")
    ),
    "vmap": _vmapped,
    "scan": _scanned,
    "map": _mapped,
    "fori_loop": _looped,
    "cond": lambda w, x: jax.lax.cond(x[0] < 9, layer, lambda w, x: w, w, x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda w, x: w, layer], w, x),
    "shard_map": _sharded,
    "shard_map, unchecked": _unchecked,
    "jit of scan of remat": jax.jit(
        lambda w, x: jax.lax.scan(
            lambda c, x: (c + jax.checkpoint(layer)(w, x), None),
            jnp.zeros((), x.dtype),
            x,
        )[0]
    ),
}

if jax.config.jax_check_tracer_leaks:
    # JAX reports plain jit(grad(shard_map(f))) as a leak, on 0.10.2 and 0.12.0.1
    # (tests/test_jax.py): only what is under no jit can be checked.
    EVERYWHERE = {k: f for k, f in EVERYWHERE.items() if "shard_map" not in k}


def instructions(fun, *args):
    """Count the instructions of the optimized program, fused ones included."""
    return instructions_of(jax.jit(fun).lower(*args))


def instructions_of(lowered):
    """Count those of a program that is lowered already."""
    text = lowered.compile().as_text()
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


def primitives(fun, *args):
    """Name the primitives of the traced program, inside nested ones too."""

    def walk(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in core.jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(fun)(*args)))


def every_value(dtype):
    """All values of an 8- or 16-bit float; a million bit patterns of a wider one."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize <= 2:
        size = 8 * dtype.itemsize
        bits = np.arange(2**size, dtype=f"uint{size}")
    else:
        count = 10**6 * dtype.itemsize // 4
        bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-40], np.float32)
    return jnp.asarray(np.concatenate([bits.view(dtype), special.astype(dtype)]))


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        np.array(a).view(np.uint8), np.array(b).view(np.uint8)
    )
