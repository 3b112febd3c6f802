"""`gradient_stats`: a norm is right wherever it is a number of its dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import f32, mesh

import stopgrad_jax as sg

SCALES = pytest.mark.parametrize("scale", [1e30, 1e-30, 1.0], ids=str)
LEAKS = pytest.mark.skipif(
    jax.config.jax_check_tracer_leaks,
    reason="JAX reports plain JAX as a leak here (tests/test_jax.py)",
)


def norm(gradient):
    return np.linalg.norm(np.asarray(gradient, np.float64).ravel())


@SCALES
def test_of_an_argument_and_of_a_value(scale):
    by = f32(1.0, -2.0, 3.0) * scale
    f = lambda x: jnp.sum(sg.name(x, "h") * by)
    for found in (
        sg.gradient_stats(f, ["x", "h"])(f32(1, 2, 3)),
        jax.jit(sg.gradient_stats(f, ["x", "h"]))(f32(1, 2, 3)),
    ):
        for name in ("x", "h"):
            np.testing.assert_allclose(found[name].norm, norm(by), rtol=1e-6)
            np.testing.assert_allclose(found[name].max, 3 * scale, rtol=1e-6)
            assert found[name].nonfinite == 0


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ((0.0, 0.0), 0.0),
        ((0.0, jnp.inf), jnp.inf),
        ((-jnp.inf, 1e30, jnp.inf), jnp.inf),
        ((jnp.nan, 1e30), jnp.nan),
        ((jnp.nan, jnp.inf, 0.0), jnp.nan),
        ((3e38, 3e38), jnp.inf),  # the norm itself is past float32
        ((), 0.0),
    ],
    ids=str,
)
def test_of_zeros_and_of_what_is_not_finite(gradient, expected, run):
    by = jnp.asarray(gradient, "float32")
    f = lambda x, by: jnp.sum(sg.name(x, "h") * by)
    found = run(sg.gradient_stats(f, ["x", "h"]))(jnp.ones(len(gradient), by.dtype), by)
    for name in ("x", "h"):
        np.testing.assert_array_equal(found[name].norm, np.float32(expected))
        assert found[name].nonfinite == int(np.sum(~np.isfinite(gradient)))


def test_each_step_of_a_scan_has_a_scale_of_its_own():
    """The loss sums c * s over steps of one c: by h of step t, it is s of t."""
    scales = f32(1e30, 1e-30, 0.0, jnp.inf, 2.0)

    def f(x):
        def step(_, s):
            return None, jnp.sum(sg.name(x, "h") * f32(3.0, 4.0) * s)

        return jnp.sum(jax.lax.scan(step, None, scales)[1])

    found = jax.jit(sg.gradient_stats(f, "h"))(f32(1.0, 1.0))["h"]
    np.testing.assert_allclose(found.norm, 5 * scales, rtol=1e-6)


@LEAKS
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "scales",
    [(1e30,) * 4, (1e-30,) * 4, (1e30, 1e-30, 1.0, 0.0), (0.0,) * 4],
    ids=str,
)
def test_of_devices_with_scales_of_their_own(scales, check_vma):
    """Around a shard_map, and inside of it."""
    by = f32(3.0, 4.0) * f32(*scales)[:, None]
    x = jnp.ones((4, 2), jnp.float32)
    loss = lambda x, by: jnp.sum(sg.name(x, "h") * by)
    shards = {"mesh": mesh(), "check_vma": check_vma}
    sharded = lambda f, out: jax.shard_map(
        f, in_specs=(P("d"), P("d")), out_specs=out, **shards
    )
    inside = sharded(sg.gradient_stats(loss, ["h", "x"]), P())
    total = sharded(lambda x, by: jax.lax.psum(loss(x, by), "d"), P())
    for stats in (inside, sg.gradient_stats(total, ["h", "x"])):
        found = jax.jit(stats)(x, by)
        for name in ("h", "x"):
            np.testing.assert_allclose(found[name].norm, norm(by), rtol=1e-6)
            np.testing.assert_allclose(found[name].max, 4 * max(scales), rtol=1e-6)


@LEAKS
@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan], ids=str)
def test_of_one_device_that_is_not_finite(bad):
    by = f32(1e30, bad, 0.0, 1e-30)[:, None]
    loss = lambda x, by: jnp.sum(sg.name(x, "h") * by)
    specs = {"in_specs": (P("d"), P("d")), "out_specs": P(), "mesh": mesh()}
    total = lambda x, by: jax.lax.psum(loss(x, by), "d")
    for stats in (
        jax.shard_map(sg.gradient_stats(loss, "h"), **specs),
        sg.gradient_stats(jax.shard_map(total, **specs), "h"),
    ):
        found = jax.jit(stats)(jnp.ones((4, 1), jnp.float32), by)["h"]
        np.testing.assert_array_equal(found.norm, np.float32(bad))
        assert found.nonfinite == 1


@LEAKS
@SCALES
def test_in_pmap(scale):
    by = f32(*range(1, 9)).reshape(4, 2) * scale
    stats = jax.pmap(sg.gradient_stats(lambda x, by: jnp.sum(x * by), "x"))
    found = stats(jnp.ones((4, 2), jnp.float32), by)["x"]
    np.testing.assert_allclose(found.norm, np.full(4, norm(by)), rtol=1e-6)


@SCALES
def test_it_may_be_differentiated(scale):
    """The norm of 2 w x by w is that of 2 x, whatever its unit is."""
    x = f32(3.0, 4.0) * scale

    def of(w):
        f = lambda h: jnp.sum(h * w * 2 * x)
        return sg.gradient_stats(f, "h")(jnp.ones(2, jnp.float32))["h"].norm

    np.testing.assert_allclose(jax.grad(of)(jnp.float32(1.5)), 10 * scale, rtol=1e-5)
