"""Every verb on arrays whose sharding is part of their type, and where it is not.

Under `jax.set_mesh`, with Auto axes and with Explicit ones: what `jax.make_mesh` makes
if nothing is said. Expected numbers are plain JAX's, on one device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from explicit_cases import (
    PROGRAMS,
    W,
    X,
    layer,
    mesh_of,
    placed,
    scanned,
    scanned_by_hand,
)
from jax.sharding import PartitionSpec as P

import stopgrad_jax as sg

if jax.config.jax_check_tracer_leaks:
    pytest.skip(
        "JAX reports plain JAX as a leak here (tests/test_jax.py)",
        allow_module_level=True,
    )

H = np.tanh(X @ W)
BY_X = (2 * H * (1 - H**2)) @ W.T
BY_W = X.T @ (2 * H * (1 - H**2))
# JAX 0.10.2 takes no gradient of an unchecked part of a mesh but a jitted one.
ONLY_JITTED = ("unchecked over rows",) if jax.__version_info__ < (0, 11) else ()
EVERY = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    here = mesh_of(request.param)
    with jax.set_mesh(here):
        yield here


def close(found, expected, **kwargs):
    np.testing.assert_allclose(
        jax.device_get(found), expected, **{"rtol": 2e-5, "atol": 1e-6} | kwargs
    )


@EVERY
def test_queries(mesh, program):
    w, x = placed(mesh)
    f = PROGRAMS[program]
    value, grads = jax.jit(sg.value_and_gradients(f, ["w", "x", "h"]))(w, x)
    close(value, np.sum(H**2))
    for found, expected in zip(grads, (BY_W, BY_X, 2 * H), strict=True):
        close(found, expected)
    for found, like in zip(grads, (w, x), strict=False):
        assert jax.typeof(found).sharding == jax.typeof(like).sharding
    run = jax.jit if program in ONLY_JITTED else lambda f: f
    held = run(sg.gradients(f, ["x", "h"], stop_gradients="h"))(w, x)
    assert held[0] is None
    close(held[1], 2 * H)
    stopped = lambda w, x: f(jax.lax.stop_gradient(w), x)
    zero = sg.gradients(stopped, "w", unconnected_gradients="zero")(w, x)
    assert jax.typeof(zero) == jax.typeof(w)
    assert not np.any(jax.device_get(zero))


@EVERY
def test_points(mesh, program):
    """Also where what is given is one copy for all devices."""
    w, x = placed(mesh)
    f = PROGRAMS[program]
    close(jax.jit(sg.capture(f, "h"))(w, x)[1]["h"], H)
    close(jax.jit(sg.edit(f, {"h": lambda h: 3 * h}))(w, x), 9 * np.sum(H**2))
    ones = lambda h: jnp.ones(h.shape, h.dtype)
    close(jax.jit(sg.edit(f, {"h": ones}))(w, x), H.size)
    zero = {"h": jnp.zeros(H.shape, jnp.float32)}
    perturbed = jax.jit(jax.grad(sg.perturb(f, "h")))
    close(perturbed(zero, w, x)["h"], 2 * H)
    direction = {"h": jnp.ones(H.shape, jnp.float32)}
    push = lambda p: sg.perturb(f, "h")(p, w, x)
    close(jax.jit(lambda: jax.jvp(push, (zero,), (direction,))[1])(), np.sum(2 * H))


@EVERY
def test_flow_contracts_and_statistics(mesh, program):
    w, x = placed(mesh)
    f = PROGRAMS[program]
    flow = sg.flow(f)(w, x)
    assert "unknown" not in str(flow)
    assert flow.connected("w")
    assert flow.connected("x")
    sg.assert_gradient(f, ["w", "x", "h"])(w, x)
    stopped = lambda w, x: f(jax.lax.stop_gradient(w), x)
    sg.assert_no_gradient(stopped, "w")(w, x)
    stats = jax.jit(sg.gradient_stats(f, ["h", "w"]))(w, x)
    for name, expected in (("h", 2 * H), ("w", BY_W)):
        close(stats[name].norm, np.linalg.norm(expected))
        close(stats[name].max, np.abs(expected).max())
        close(stats[name].zero_fraction, 0)


@pytest.mark.parametrize(
    "program", ["plain", "rectified", "vmap", "unchecked over rows"]
)
def test_probes(mesh, program):
    w, x = placed(mesh)
    f = PROGRAMS[program]
    if program in ONLY_JITTED:
        with pytest.raises(ValueError, match="out_specs argument must refer to"):
            jax.grad(f)(w, x)
        pytest.skip("JAX itself raises there")
    assert sg.find_nonfinite(f)(w, x) is None
    sg.check_gradients(f)(w, x)


def test_probes_find_what_is_wrong(mesh):
    w, x = placed(mesh)

    def broken(w, x):
        return jnp.sum(jnp.log(jnp.tanh(x @ w) - 2))

    report = sg.find_nonfinite(broken)(w, x)
    assert report.expression.startswith("jnp.log(")
    assert report.line == broken.__code__.co_firstlineno + 1

    def in_a_loop(w, x):
        step = lambda h, _: (jnp.sqrt(h - 0.3), None)
        return jnp.sum(jax.lax.scan(step, x * x, None, 3)[0] @ w)

    report = sg.find_nonfinite(in_a_loop)(w, x)
    assert report.expression == "jnp.sqrt(h - 0.3)"

    @jax.custom_vjp
    def wrong(h):
        return h**2

    wrong.defvjp(lambda h: (h**2, h), lambda h, ct: (3 * h * ct,))
    with pytest.raises(AssertionError, match=r"the rule of wrong .* is not"):
        sg.check_gradients(lambda w, x: wrong(x @ w))(w, x)


@pytest.mark.parametrize("order", [1, 2])
def test_checks_in_both_modes(mesh, order):
    w, x = placed(mesh)
    sg.check_gradients(layer, modes=("rev", "fwd"), order=order)(w, x)


def test_loops_stack_in_front(mesh):
    w, x = placed(mesh)
    zero = jnp.zeros((3, *X.shape), jnp.float32)
    expected = jax.grad(scanned_by_hand, (0, 2))(jnp.asarray(W), jnp.asarray(X), zero)
    found = jax.jit(sg.gradients(scanned, ["w", "h"]))(w, x)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert sg.flow(scanned)(w, x).connected("w")
    assert "unknown" not in str(sg.flow(scanned)(w, x))


def test_a_loop_around_a_shard_map(mesh):
    """And a variable of its body, which has no name."""
    _, x = placed(mesh)

    def part(h):
        feat = jnp.sin(h)
        return sg.name(feat, "h") ** 2

    specs = {"in_specs": P("d"), "out_specs": P("d"), "axis_names": {"d"}}
    around = jax.shard_map(part, **specs)
    f = lambda x: jnp.sum(jax.lax.scan(lambda c, _: (around(c), None), x, None, 2)[0])
    by_hand = lambda d, x: jnp.sum(
        jax.lax.scan(lambda c, d: ((jnp.sin(c) + d) ** 2, None), x, d)[0]
    )
    expected = jax.grad(by_hand)(jnp.zeros((2, *X.shape)), jnp.asarray(X))
    for address in ("h", sg.var("feat"), sg.op("sin")):
        close(jax.jit(sg.gradients(f, address))(x), expected)


def test_cotangents_and_edits_of_another_sharding(mesh):
    w, x = placed(mesh)
    ct = np.linspace(0, 1, H.size, dtype=np.float32).reshape(H.shape)
    found = sg.gradients(layer, "x", ys="h", grad_ys=jnp.asarray(ct))(w, x)
    close(found, (ct * (1 - H**2)) @ W.T)

    def loop(x, n):
        body = lambda state: (state[0] + 1, sg.name(2 * state[1], "h"))
        return jax.lax.while_loop(lambda state: state[0] < n, body, (0, x))[1]

    ones = lambda h: jnp.ones(h.shape, h.dtype)
    close(sg.edit(loop, {"h": ones})(x, jnp.int32(3)), np.ones(X.shape))
    for address in ("x", "return"):
        edited = sg.edit(lambda x: 2 * x, {address: ones})
        assert jax.typeof(edited(x)) == jax.typeof(x)


def test_stacked_examples(mesh):
    """Of a function that is mapped, over an axis that is sharded."""
    w, x = placed(mesh)
    row = lambda w, row: layer(w, row[None])
    by_h = jax.vmap(sg.gradients(row, "h"), (None, 0))
    close(by_h(w, x)[:, 0], 2 * H)
    zero = {"h": jnp.zeros((1, 4), jnp.float32)}
    perturbed = jax.vmap(jax.grad(sg.perturb(row, "h")), (None, None, 0))
    close(perturbed(zero, w, x)["h"][:, 0], 2 * H)


LAYOUTS = {
    "data": (P(), P(), P("d")),
    "tensor": (P(None, "m"), P("m"), P()),
    "both": (P(None, "m"), P("m"), P("d")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("standard_promotion")
def test_training(mesh, layout):
    """Five steps of momentum, two micro-batches each, a gate inside."""
    v = np.linspace(0.5, -0.5, 4, dtype=np.float32).reshape(4, 1)
    y = np.linspace(-1, 1, 8, dtype=np.float32).reshape(8, 1)

    def weighed(h, v):  # JAX makes no product over an axis sharded on both sides
        return jnp.sum(h * v[:, 0], 1, keepdims=True)

    def loss(params, batch):
        h = sg.scale_gradient(jnp.tanh(batch[0] @ params["w"]), 0.5)
        return jnp.mean((weighed(h, params["v"]) - batch[1]) ** 2)

    def by_hand(params, batch):
        h = jnp.tanh(batch[0] @ params["w"])
        h = 0.5 * h + 0.5 * jax.lax.stop_gradient(h)
        return jnp.mean((h @ params["v"] - batch[1]) ** 2)

    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.asarray(W), "v": jnp.asarray(v)}
    batch, state = (jnp.asarray(X), jnp.asarray(y)), optimizer.init(params)
    for _ in range(5):
        grads = jax.grad(by_hand)(params, batch)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)

    put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
    of_w, of_v, of_batch = LAYOUTS[layout]
    step = sg.train.make_step(loss, optimizer, accumulate=2, stats="params/w")
    ours = step.init({"w": put(W, of_w), "v": put(v, of_v)})
    here = put(X, of_batch), put(y, of_batch)
    for _ in range(5):
        ours, metrics = step(ours, here)
    for name, expected in params.items():
        close(ours.params[name], expected)
    assert np.all(np.isfinite(jax.device_get(metrics["loss"])))
