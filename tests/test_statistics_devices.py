"""`gradient_stats` inside of `shard_map` and `pmap`, around them, and in both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from programs import f32

import stopgrad_jax as sg

if jax.config.jax_check_tracer_leaks:
    pytest.skip(
        "JAX reports plain JAX as a leak here (tests/test_jax.py)",
        allow_module_level=True,
    )

W = jnp.float32(0.5)
X = f32(*np.linspace(-1.5, 2.5, 16)).reshape(8, 2)
X = X.at[3].set(0)
EACH = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
KINDS = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def mesh(kind="Auto", *sizes):
    sizes = sizes or (4,)
    kinds = (getattr(jax.sharding.AxisType, kind),) * len(sizes)
    return jax.make_mesh(sizes, ("d", "m")[: len(sizes)], axis_types=kinds)


def loss(w, x):
    """Sum up squares of a rectified h: its gradient is 2 h, zero where h is."""
    return jnp.sum(sg.name(jax.nn.relu(w * x), "h") ** 2)


def of(gradient, copies=1):
    """Closed form of the statistics of a gradient that counts so many times."""
    size = np.abs(np.asarray(gradient, np.float64))
    norm = np.sqrt(copies * np.sum(size**2))
    return norm, np.max(size), np.mean(size == 0), 0


def numbers(stats):
    return stats.norm, stats.max, stats.zero_fraction, stats.nonfinite


def assert_stats(found, expected):
    for name, gradient in expected.items():
        want = gradient if isinstance(gradient, tuple) else of(gradient)
        np.testing.assert_allclose(numbers(found[name]), want, rtol=2e-6, err_msg=name)


def by_hand(w, x):
    """Gradients of the loss in NumPy: by h, by w, by x."""
    h = np.maximum(np.float64(w) * np.asarray(x, np.float64), 0)
    return 2 * h, np.sum(2 * h * np.asarray(x)), 2 * h * np.float64(w)


GH, GW, GX = by_hand(W, X)


@KINDS
@EACH
def test_inside_the_numbers_are_those_of_all_shards(check_vma, kind):
    """As one array has them; each device's own gradient by w counts if unchecked."""
    here = mesh(kind)
    x = jax.device_put(X, jax.NamedSharding(here, P("d")))
    part = sg.gradient_stats(loss, ["h", "w", "x"])
    specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
    found = jax.jit(jax.shard_map(part, mesh=here, **specs))(W, x)
    each = np.array([by_hand(W, rows)[1] for rows in np.split(np.asarray(X), 4)])
    assert_stats(found, {"h": GH, "x": GX, "w": GW if check_vma else each})


@EACH
def test_as_aux_of_a_derivative(check_vma):
    """Inside a shard_map that is differentiated, and inside the derivative."""

    def part(w, x):
        stats = sg.gradient_stats(loss, "h")(w, x)
        _, inner = jax.grad(
            lambda w: (loss(w, x), sg.gradient_stats(loss, "h")(w, x)), has_aux=True
        )(w)
        return jax.lax.psum(loss(w, x), "d"), (stats, inner)

    specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
    sharded = jax.shard_map(part, mesh=mesh(), **specs)
    slope, both = jax.jit(jax.grad(sharded, has_aux=True))(W, X)
    np.testing.assert_allclose(slope, GW, rtol=2e-6)
    for found in both:
        assert_stats(found, {"h": GH})


def test_in_pmap_every_device_has_the_numbers_of_all():
    stats = jax.pmap(sg.gradient_stats(loss, ["h", "x"]), in_axes=(None, 0))
    found = stats(W, X.reshape(4, 2, 2))
    for device in range(4):
        each = jax.tree.map(lambda a, k=device: a[k], found)
        assert_stats(each, {"h": GH, "x": GX})


def test_around_pmap():
    f = lambda w, x: jnp.sum(jax.pmap(loss, in_axes=(None, 0))(w, x))
    found = sg.gradient_stats(f, ["h", "w", "x"])(W, X.reshape(4, 2, 2))
    assert_stats(found, {"h": GH, "w": GW, "x": GX})


@KINDS
@EACH
def test_a_replicated_value_and_a_scalar_of_each_shard(check_vma, kind):
    """sum(r * x) + sum of squares of the shards' sums s, with r = w (1, 0)."""

    def part(w, x):
        r = sg.name(w * f32(1.0, 0.0), "r")
        s = sg.name(jnp.sum(x), "s")
        return jax.lax.psum(jnp.sum(r * x) + s**2, "d")

    here = mesh(kind)
    specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
    f = lambda w, x: jax.shard_map(part, mesh=here, **specs)(w, x)
    x = jax.device_put(X, jax.NamedSharding(here, P("d")))
    found = jax.jit(sg.gradient_stats(f, ["r", "s"]))(W, x)
    shards = np.asarray(X, np.float64).reshape(4, 2, 2).sum(1)
    expected = shards.sum(0) if check_vma else shards  # unchecked, each copy counts
    assert_stats(found, {"r": expected, "s": 2 * shards.sum(1)})


def test_one_mesh_axis_around_and_one_inside():
    """Rows over d around gradient_stats, columns over m in the function."""

    def part(w, x):
        inner = jax.shard_map(
            lambda w, x: jax.lax.psum(loss(w, x), "m"),
            in_specs=(P(), P(None, "m")),
            out_specs=P(),
            axis_names={"m"},
            check_vma=False,
        )
        return sg.gradient_stats(lambda w, x: inner(w, x), ["h", "x"])(w, x)

    specs = {"in_specs": (P(), P("d")), "out_specs": P(), "axis_names": {"d"}}
    f = jax.shard_map(part, mesh=mesh("Auto", 2, 2), check_vma=False, **specs)
    assert_stats(jax.jit(f)(W, X), {"h": GH, "x": GX})


@EACH
def test_a_scan_of_a_shard_map_of_a_scan(check_vma):
    """h = w c at each of 2 * 3 steps; by h of step t: the sum of the later powers."""

    def part(w, x):
        def step(c, _):
            c = sg.name(w * c, "h")
            return c, jnp.sum(c)

        c, sums = jax.lax.scan(step, x, None, 3)
        return c, jnp.sum(sums)[None]

    specs = {"in_specs": (P(), P("d")), "out_specs": (P("d"), P("d"))}
    around = jax.shard_map(part, mesh=mesh(), check_vma=check_vma, **specs)

    def f(w, x):
        return jnp.sum(jax.lax.scan(lambda c, _: around(w, c), x, None, 2)[1])

    found = jax.jit(sg.gradient_stats(f, ["h"]))(W, X)["h"]
    slopes = np.array([sum(0.5**k for k in range(6 - t)) for t in range(6)])
    slopes = slopes.reshape(2, 3)
    np.testing.assert_allclose(found.norm, slopes * np.sqrt(X.size), rtol=2e-6)
    np.testing.assert_allclose(found.max, slopes, rtol=2e-6)
    np.testing.assert_array_equal(found.zero_fraction, np.zeros((2, 3)))
    gradient = jax.jit(sg.gradients(f, "h"))(W, X)
    assert gradient.shape == (2, 3, *X.shape)  # time first, then the shards' rows
    expected = np.broadcast_to(slopes[..., None, None], gradient.shape)
    np.testing.assert_allclose(gradient, expected, rtol=2e-6)


def test_structural_zeros_and_empty_loops_inside():
    def part(x):
        def f(x):
            empty = lambda c, _: (sg.name(2 * c, "never"), None)
            c, _ = jax.lax.scan(empty, x, None, 0)
            return jnp.sum(c * jax.lax.stop_gradient(sg.name(x + 1, "stopped")))

        return sg.gradient_stats(f, ["never", "stopped", "x"])(x)

    specs = {"in_specs": P("d"), "out_specs": P()}
    found = jax.jit(jax.shard_map(part, mesh=mesh(), **specs))(X)
    assert found["never"].norm.shape == (0,)
    assert found["stopped"].cause.startswith("stop_gradient, on purpose")
    assert found["stopped"].zero_fraction == 1
    assert_stats(found, {"x": np.asarray(X) + 1})


def test_in_a_training_step_in_shard_map():
    step = sg.train.make_step(
        lambda params, x: loss(params["w"], x), optax.sgd(0.0), stats=["h", "params"]
    )
    stats = jax.shard_map(
        lambda state, x: step(state, x)[1]["stats"],
        mesh=mesh(),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    found = jax.jit(stats)(step.init({"w": W}), X)
    assert_stats(found, {"h": GH, "params/w": GW})
