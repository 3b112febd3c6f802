"""`gradient_stats`: the norms of gradients, without the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import EVERYWHERE, f32, instructions, mesh, primitives

import stopgrad_jax as sg

W, X = jnp.float32(0.7), f32(0.5, -1.0, 0.0, 2.0)
GRADIENT = 2 * np.tanh(0.7 * np.array([0.5, -1.0, 0.0, 2.0]))  # of sum(h**2) by h
PER_STEP = ("scan", "map", "fori_loop", "jit of scan of remat")


@pytest.mark.parametrize("way", EVERYWHERE)
def test_closed_form_in_every_way_of_writing_it(way, run):
    found = run(sg.gradient_stats(EVERYWHERE[way], ["h", "w"]))(W, X)
    scanned = found["h"].norm.shape == (4,)
    expected = np.abs(GRADIENT) if scanned else np.linalg.norm(GRADIENT)
    np.testing.assert_allclose(found["h"].norm, expected, rtol=2e-6)
    largest = np.abs(GRADIENT) if scanned else np.abs(GRADIENT).max()
    np.testing.assert_allclose(found["h"].max, largest, rtol=2e-6)
    zeros = [0, 0, 1, 0] if scanned else 0.25
    np.testing.assert_array_equal(found["h"].zero_fraction, zeros)
    assert not np.any(found["h"].nonfinite)
    assert found["h"].cause is None
    assert scanned == (way in PER_STEP)
    slope = jax.grad(EVERYWHERE[way])(W, X)
    np.testing.assert_allclose(found["w"].norm, abs(slope), rtol=2e-6)


def test_structural_zeros_have_a_cause_also_under_jit(run):
    def loss(w, frozen, unused):
        return w * sg.name(jax.lax.stop_gradient(frozen), "stopped")

    stats = run(sg.gradient_stats(loss, ["w", "frozen", "unused", "stopped"]))
    found = stats(f32(2.0, 3.0).sum(), 3.0, f32(1.0))
    assert found["w"].cause is None
    assert found["stopped"].cause is None  # a gradient comes, and goes no further
    assert found["frozen"].cause.startswith("stop_gradient, on purpose (")
    assert "test_statistics.py:" in found["frozen"].cause
    assert found["unused"].cause == "no y is computed from it"
    for name in ("frozen", "unused"):
        assert found[name].norm == 0
        assert found[name].zero_fraction == 1


def test_nonfinite_entries_are_counted():
    f = lambda x: jnp.sum(jnp.sqrt(sg.name(x, "h")))
    found = sg.gradient_stats(f, ["h", "x"])(f32(0.0, 1.0, -1.0))
    for name in ("h", "x"):
        assert found[name].nonfinite == 2  # inf at 0, nan at -1
        assert np.isnan(found[name].norm)


def test_every_array_of_a_tree_has_its_address():
    def loss(params, x):
        offset = params["n"].astype(jnp.float32)
        return jnp.sum(params["a"]["w"] * x) + params["b"] ** 2 + offset

    params = {"a": {"w": f32(1.0, 2.0)}, "b": jnp.float32(3.0), "n": jnp.int32(1)}
    found = sg.gradient_stats(loss, "params")(params, f32(3.0, 4.0))
    assert {k: float(v.norm) for k, v in found.items()} == {
        "params/a/w": 5.0,
        "params/b": 6.0,
    }
    again = sg.gradient_stats(loss, ["params/*/w", 0])(params, f32(3.0, 4.0))
    assert list(again) == ["params/a/w", "0/a/w", "0/b"]


def test_sites_of_one_name_are_told_apart():
    def f(x):
        return sg.name(2 * x, "h") + 3 * sg.name(5 * x, "h")

    found = sg.gradient_stats(f, "h")(1.0)
    assert {k: float(v.norm) for k, v in found.items()} == {"h/0": 1.0, "h/1": 3.0}


def twice(x):
    h = jnp.sin(x)
    h = jnp.sin(h)
    return sg.name(h * 3.0, "h")


COS = np.cos(np.float32(0.5))
SLOPES = [3.0 * np.cos(np.sin(np.float32(0.5))), 3.0, 1.0]  # by each h, at 0.5


@pytest.mark.parametrize(
    ("xs", "expected"),
    [
        ([sg.var("h", nth=0), sg.var("h", nth=1)], SLOPES[:2]),
        ([sg.var("h", nth=-1), "h"], SLOPES[1:]),
        ([sg.point("h"), sg.var("h", nth=0), sg.var("h", nth=1)], [1.0, *SLOPES[:2]]),
        ([sg.op("sin", nth=1), sg.op("sin", nth=0)], [3.0, SLOPES[0]]),
    ],
)
def test_addresses_of_one_name_are_told_apart(xs, expected, run):
    """By themselves, as they are printed; a string is as it is written."""
    found = run(sg.gradient_stats(twice, xs))(jnp.float32(0.5))
    keys = [x if isinstance(x, str) else repr(x) for x in xs]
    assert found.keys() == set(keys)
    norms = [found[key].norm for key in keys]
    np.testing.assert_allclose(norms, expected, rtol=2e-6)


def test_executions_of_two_statements_of_one_name_are_told_apart():
    def f(x):
        for k in (2.0, 3.0):
            h = k * x
            h = jnp.exp(h)
            x = x + h * 0.0 + k
        return h + x

    first, second = sg.var("h", nth=0), sg.var("h", nth=1)
    found = sg.gradient_stats(f, [first, second, "x"])(jnp.float32(0.0))
    parts = {f"{address!r}/{k}" for address in (first, second) for k in (0, 1)}
    assert found.keys() == parts | {"x"}


def test_variables_of_two_functions_are_told_apart():
    def one(x):
        h = 2.0 * x
        return h

    def other(x):
        h = 3.0 * x
        return h

    xs = [sg.var("one.h"), sg.var("other.h")]
    found = sg.gradient_stats(lambda x: one(x) * other(x), xs)(jnp.float32(1.0))
    assert {k: float(v.norm) for k, v in found.items()} == {
        'sg.var("one.h")': 3.0,
        'sg.var("other.h")': 2.0,
    }


def test_one_value_at_two_addresses_has_one_key():
    f = lambda x: sg.name(2.0 * x, "h") ** 2
    found = sg.gradient_stats(f, ["h", sg.point("h"), "x", "*"])(jnp.float32(1.0))
    assert {k: float(v.norm) for k, v in found.items()} == {"h": 4.0, "x": 8.0}


@pytest.mark.skipif(
    jax.config.jax_check_tracer_leaks,
    reason="JAX reports plain JAX as a leak here (tests/test_jax.py)",
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_scan_in_shard_map(check_vma):
    """Row i of x is on device i; step t hands on c * w; the loss is sum(c**2)."""
    x, w = jnp.arange(1.0, 9.0, dtype=jnp.float32).reshape(4, 2), jnp.float32(0.5)

    def part(w, x):
        def step(c, _):
            c = sg.name(w * c, "h")
            return c, jnp.sum(c**2)

        return jax.lax.psum(jnp.sum(jax.lax.scan(step, x, None, 3)[1]), "d")

    def f(w, x):
        specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
        return jax.shard_map(part, mesh=mesh(), **specs)(w, x)

    found = jax.jit(sg.gradient_stats(f, ["h", "x"]))(w, x)
    steps = np.array([0.5, 0.25, 0.125])  # c at each step, over x
    tail = [sum(2 * steps[k:] * 0.5 ** np.arange(3 - k)) for k in range(3)]
    norm = np.linalg.norm(np.arange(1.0, 9.0))
    np.testing.assert_allclose(found["h"].norm, np.array(tail) * norm, rtol=2e-6)
    np.testing.assert_allclose(found["h"].max, np.array(tail) * 8, rtol=2e-6)
    np.testing.assert_array_equal(found["h"].zero_fraction, np.zeros(3))
    np.testing.assert_allclose(found["x"].norm, tail[0] / 2 * norm, rtol=2e-6)


def test_a_branch_not_taken_has_zeros():
    f = lambda p, x: jax.lax.cond(p, lambda x: sg.name(x**2, "h"), jnp.sin, x)
    found = sg.gradient_stats(f, "h")
    assert found(True, 2.0)["h"].norm == 1
    assert found(jnp.bool_(False), 2.0)["h"].zero_fraction == 1


def test_under_vmap_each_example_has_its_own():
    f = lambda w: jnp.sum(sg.name(w * X, "h") ** 2)
    w = f32(1.0, 2.0, 3.0)
    found = jax.vmap(sg.gradient_stats(f, "h"))(w)
    expected = 2 * w * np.linalg.norm(X)
    np.testing.assert_allclose(found["h"].norm, expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype):
    x = jnp.full(1000, 200.0, dtype)  # the sum of squares is past float16
    found = sg.gradient_stats(lambda x: jnp.sum(sg.name(x, "h") * x), "h")(x)
    assert found["h"].norm.dtype == jnp.float32
    np.testing.assert_allclose(found["h"].norm, 200.0 * 1000**0.5, rtol=1e-6)


def test_complex_gradients_have_magnitudes():
    f = lambda z: jnp.sum(jnp.real(sg.name(z, "h") * (3 + 4j)))
    found = sg.gradient_stats(f, ["h", "z"])(jnp.ones(2, jnp.complex64))
    assert found["h"].max == found["z"].max == 5


def test_the_gradient_of_a_scan_is_never_stacked():
    """No array of all steps' cotangents, in contrast to `gradients`."""

    def f(w, x):
        def step(c, x):
            return jnp.sin(sg.name(c * w, "h")) + x, None

        return jnp.sum(jax.lax.scan(step, jnp.zeros(5), x)[0])

    x = jnp.ones((7, 5))
    # Residuals of the forward pass are stacked in any case: one array more is the
    # gradient's.
    count = lambda fun: sum(
        v.aval.shape == (7, 5)
        for eqn in jax.make_jaxpr(fun)(0.5, x).jaxpr.eqns
        for v in eqn.outvars
        if eqn.primitive.name == "scan"
    )
    plain = count(jax.grad(f))
    assert count(sg.gradients(f, ["w", "h"])) == plain + 1
    assert count(sg.gradient_stats(f, ["w", "h"])) == plain


def test_no_host_callback_and_one_backward_pass():
    f = EVERYWHERE["scan"]
    stats = sg.gradient_stats(f, ["h", "w"])
    assert not any("callback" in p for p in primitives(stats, W, X))
    text = jax.jit(stats).lower(W, X).compile().as_text()
    assert "custom-call" not in text
    more = instructions(stats, W, X) - instructions(jax.grad(f), W, X)
    assert 0 < more < 110  # the sums, and the scale that they are in
    longer = jnp.ones(400, jnp.float32)
    more_of_longer = instructions(stats, W, longer)
    assert abs(more_of_longer - instructions(stats, W, longer[:40])) <= 2


def test_traced_once_under_jit():
    traces = []

    def f(w):
        traces.append(None)
        return sg.name(w, "h") ** 2

    stats = jax.jit(sg.gradient_stats(f, "h"))
    stats(1.0), stats(2.0)
    assert len(traces) == 1


def test_ys_choose_what_is_differentiated():
    f = lambda x: {"loss": x**2, "metric": 5 * x}
    assert sg.gradient_stats(f, "x", ys="return/metric")(1.0)["x"].norm == 5
    with pytest.raises(TypeError) as caught:
        sg.gradient_stats(f, "x")(1.0)
    assert "must return one array, or ys must say which" in str(caught.value)
    assert 'write: ys="return/loss" for one' in str(caught.value)


def test_refusals():
    f = lambda x, n: x * n.astype(x.dtype)
    with pytest.raises(sg.AddressError, match='one of "x"'):
        sg.gradient_stats(f, "xx")(jnp.float32(1.0), jnp.int32(2))
    with pytest.raises(TypeError) as caught:
        sg.gradient_stats(f, "n")(jnp.float32(1.0), jnp.int32(3))
    message = str(caught.value)
    assert "address 'n': a value that carries a gradient" in message
    assert "got:   i32[]" in message
    assert "write: the address of a float" in message
    with pytest.raises(TypeError, match="at least one address"):
        sg.gradient_stats(f, [])
    with pytest.raises(TypeError, match="must be addresses"):
        sg.gradient_stats(f, 1.5)

    def loop(x):
        body = lambda v: sg.name(v * 2, "h")
        return jax.lax.while_loop(lambda v: v < 9, body, x)

    with pytest.raises(ValueError, match="the number of steps must be known"):
        sg.gradient_stats(loop, "h")(1.0)
