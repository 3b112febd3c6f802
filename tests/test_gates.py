"""Laws of the gates: exact forward, all orders, one meaning, traced parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, mesh

import stopgrad_jax as sg

GATES = {
    "stop": sg.stop_gradient,
    "scale": lambda x: sg.scale_gradient(x, 0.5),
    "reverse": sg.reverse_gradient,
    "mask": lambda x: sg.mask_gradient(x, False),
    "clip": lambda x: sg.clip_gradient(x, -1, 1),
    "norm": lambda x: sg.clip_gradient_norm(x, 1.0),
    "transform": lambda x: sg.transform_gradient(x, jnp.negative),
    "optax": lambda x: sg.transform_gradient(x, optax.clip_by_global_norm(1.0)),
    "nonfinite": sg.replace_nonfinite_gradient,
    "per_example": lambda x: jax.vmap(lambda _: sg.per_example(x, "i"), axis_name="i")(
        jnp.arange(2)
    )[0],
    "prevent": sg.prevent_gradient,
    "replace": lambda x: sg.replace_value(jnp.zeros_like(x), x),
    "straight_through": sg.straight_through(lambda x: x, jnp.zeros_like),
    "with_backward": sg.with_backward(lambda x: x, lambda ct, out, x: (ct,)),
}


DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_forward_is_exact(gate, dtype, run):
    if gate == "clip" and dtype == "complex64":
        gate = "norm"  # there is no clip of complex numbers
    with jax.enable_x64(dtype == "float64" or jax.config.jax_enable_x64):
        x = every_value(dtype)
        assert_same_bits(run(GATES[gate])(x), x)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_forward_is_exact_beside_its_derivative(gate):
    if gate is GATES["prevent"]:
        gate = lambda x: sg.prevent_gradient(jax.lax.stop_gradient(x))
    x = every_value("bfloat16")
    assert_same_bits(jax.jit(lambda x: jax.vjp(gate, x)[0])(x), x)
    xs = x[: 4 * 1000].reshape(4, -1)
    assert_same_bits(jax.jit(jax.vmap(gate))(xs), xs)


def test_reversal_to_third_order_in_every_mode():
    f = lambda x: sg.reverse_gradient(x) ** 3
    second = {
        "reverse over reverse": jax.grad(jax.grad(f)),
        "forward over reverse": jax.jacfwd(jax.grad(f)),
        "reverse over forward": jax.jacrev(jax.jacfwd(f)),
        "forward over forward": jax.jacfwd(jax.jacfwd(f)),
    }
    assert jax.grad(f)(2.0) == -12
    assert jax.jvp(f, (2.0,), (1.0,))[1] == -12
    for name, derivative in second.items():
        assert derivative(2.0) == 12, name
        for third in (jax.jacfwd, jax.jacrev):
            assert third(derivative)(2.0) == -6, name


@pytest.mark.parametrize("s", [-1.0, 0.0, 0.5, 3.0])
def test_a_linear_gate_is_an_affine_function(s):
    """At x0 = 2: every derivative is that of x -> x0 + s * (x - x0)."""
    f = lambda x: jnp.sin(sg.scale_gradient(x, s)) * x
    affine = lambda x: jnp.sin(2.0 + s * (x - 2.0)) * x
    for wrt in (jax.grad, jax.jacfwd):
        for second in (jax.grad, jax.jacfwd):
            for third in (jax.grad, jax.jacfwd):
                ours = [wrt(f), second(wrt(f)), third(second(wrt(f)))]
                theirs = [wrt(affine), second(wrt(affine)), third(second(wrt(affine)))]
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(a(2.0), b(2.0), rtol=1e-5, atol=1e-6)


# One meaning everywhere ------------------------------------------------------------

# JAX reports plain grad of shard_map as a leak (tests/test_jax.py).
SHARDED = not jax.config.jax_check_tracer_leaks
N = 8
W = np.array([0.5, -1.0, 2.0], np.float32)
X = (np.arange(3 * N, dtype=np.float32).reshape(N, 3) - 10) / 8
MAPPED = {
    "clip": (lambda h: sg.clip_gradient(h, -1.0, 1.0), lambda ct: np.clip(ct, -1, 1)),
    "norm": (
        lambda h: sg.clip_gradient_norm(h, 1.0),
        lambda ct: ct * min(1, 1 / max(np.linalg.norm(ct), 1e-30)),
    ),
    "transform": (lambda h: sg.transform_gradient(h, jnp.sign), np.sign),
    "reverse": (sg.reverse_gradient, np.negative),
}


def _total(part):
    """Sum a per-example loss in seven ways."""

    def sharded(check):
        def of_shard(w, xs):
            return jax.lax.psum(jnp.sum(jax.vmap(part, (None, 0))(w, xs)), "d")

        return jax.jit(
            jax.shard_map(
                of_shard,
                mesh=mesh(8),
                in_specs=(P(), P("d")),
                out_specs=P(),
                check_vma=check,
            )
        )

    def micro_batches(w, xs):
        step = lambda total, x: (total + jnp.sum(jax.vmap(part, (None, 0))(w, x)), None)
        return jax.lax.scan(step, jnp.float32(0), xs.reshape(4, 2, -1))[0]

    ways = {
        "loop": lambda w, xs: functools.reduce(jnp.add, [part(w, x) for x in xs]),
        "vmap": lambda w, xs: jnp.sum(jax.vmap(part, (None, 0))(w, xs)),
        "scan": lambda w, xs: jax.lax.scan(
            lambda total, x: (total + part(w, x), None), jnp.float32(0), xs
        )[0],
        "micro-batches": micro_batches,
        "jit": jax.jit(lambda w, xs: jnp.sum(jax.vmap(part, (None, 0))(w, xs))),
        "shard_map": sharded(True),
        "shard_map, unchecked": sharded(False),
    }
    return ways if SHARDED else {k: f for k, f in ways.items() if "shard" not in k}


@pytest.mark.parametrize("gate", MAPPED)
def test_a_mapped_value_is_gated_example_by_example(gate):
    ours, closed = MAPPED[gate]
    expected = sum(closed(2 * W * x) * x for x in X)
    ways = _total(lambda w, x: jnp.sum(ours(w * x) ** 2))
    for name, total in ways.items():
        np.testing.assert_allclose(
            jax.grad(total)(W, X), expected, rtol=1e-5, atol=1e-5, err_msg=name
        )
    for spec in (P("d"), P(None), P(None, None)):
        xs = jax.device_put(X, NamedSharding(mesh(8), spec))
        grad = jax.jit(jax.grad(ways["vmap"]))(W, xs)
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", MAPPED)
def test_an_unmapped_value_is_gated_once_on_the_sum(gate):
    ours, closed = MAPPED[gate]
    once = closed(sum(2 * W * x * x for x in X))
    each = sum(closed(2 * W * x * x) for x in X)
    part = lambda w, x: jnp.sum((ours(w) * x) ** 2)
    alone = lambda w, x: jnp.sum((ours(sg.per_example(w, "i")) * x) ** 2)

    def over(part):
        mapped = jax.vmap(part, (None, 0), axis_name="i")
        return jax.grad(lambda w, xs: jnp.sum(mapped(w, xs)))

    np.testing.assert_allclose(over(part)(W, X), once, rtol=1e-5)
    np.testing.assert_allclose(over(alone)(W, X), each, rtol=1e-5, atol=1e-5)
    ways = _total(part)
    np.testing.assert_allclose(jax.grad(ways["loop"])(W, X), each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(ways["jit"])(W, X), once, rtol=1e-5)


@pytest.mark.skipif(not SHARDED, reason="JAX reports plain JAX as a leak here")
@pytest.mark.parametrize("gate", ["clip", "norm", "transform"])
def test_a_replicated_value_in_shard_map(gate):
    """Gated on the sum where JAX knows that it is replicated; else on each device."""
    ours, closed = MAPPED[gate]
    once = closed(sum(2 * W * x * x for x in X))
    each = sum(closed(2 * W * x * x) for x in X)

    def grad(check, gate=ours):
        def of_shard(w, xs):
            return jax.lax.psum(jnp.sum((gate(w)[None] * xs) ** 2), "d")

        return jax.grad(
            jax.shard_map(
                of_shard,
                mesh=mesh(8),
                in_specs=(P(), P("d")),
                out_specs=P(),
                check_vma=check,
            )
        )(W, X)

    alone = lambda w: ours(sg.per_example(w, "d"))
    np.testing.assert_allclose(grad(True), once, rtol=1e-5)
    np.testing.assert_allclose(grad(True, alone), each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad(False), each, rtol=1e-5, atol=1e-5)


def test_us6():
    """The nan filter of user story 6: 0.881 in a loop, and wherever it is asked for."""
    ys = f32(1.0, 50.0)
    filtered = sg.replace_nonfinite_gradient
    f = lambda p, y: jnp.log1p(jnp.exp(filtered(p) * y))
    alone = lambda p, y: jnp.log1p(jnp.exp(filtered(sg.per_example(p, "i")) * y))
    loop = jax.grad(lambda p: f(p, ys[0]) + f(p, ys[1]))(2.0)
    shared = jax.grad(lambda p: jnp.sum(jax.vmap(lambda y: f(p, y))(ys)))(2.0)
    mapped = jax.vmap(alone, (None, 0), axis_name="i")
    each = jax.grad(lambda p: jnp.sum(mapped(p, ys)))(2.0)
    sigmoid = 1 / (1 + np.exp(-2.0))  # the slope at y = 1; at y = 50 it is nan, so 0
    np.testing.assert_allclose([loop, each], sigmoid, rtol=1e-6)
    assert shared == 0  # nan + 0.881 is nan: the sum is filtered


def test_per_example_is_one_value_per_example_of_each_axis():
    gate = lambda w: sg.clip_gradient(sg.per_example(w, ("i", "j")), -1.0, 1.0)
    f = jax.vmap(
        jax.vmap(lambda w, x: gate(w) * x, (None, 0), axis_name="j"),
        (None, 0),
        axis_name="i",
    )
    xs = f32(0.5, 3.0, -4.0, 0.25).reshape(2, 2)
    grad = jax.grad(lambda w: jnp.sum(f(w, xs)))(1.0)
    assert grad == 0.5 + 1.0 - 1.0 + 0.25


def test_per_example_outside_its_axis():
    with pytest.raises(
        NameError, match=r"per_example.*axis_name[\s\S]*got[\s\S]*write"
    ):
        sg.per_example(1.0, "i")


# Parameters --------------------------------------------------------------------------

WITH_PARAMETER = {
    "scale": (sg.scale_gradient, lambda ct, p: ct * p),
    "reverse": (sg.reverse_gradient, lambda ct, p: -ct * p),
    "mask": (lambda x, p: sg.mask_gradient(x, p > 1), lambda ct, p: ct * (p > 1)),
    "clip": (lambda x, p: sg.clip_gradient(x, -p, p), lambda ct, p: np.clip(ct, -p, p)),
    "norm": (sg.clip_gradient_norm, lambda ct, p: min(abs(ct), p) * np.sign(ct)),
    "closure": (
        lambda x, p: sg.transform_gradient(x, lambda ct: ct * p),
        lambda ct, p: ct * p,
    ),
    "backward": (
        lambda x, p: sg.with_backward(lambda x: x, lambda ct, out, x: (ct * p,))(x),
        lambda ct, p: ct * p,
    ),
}


@pytest.mark.parametrize("gate", WITH_PARAMETER)
def test_parameters_are_traced_values(gate):
    gate, closed = WITH_PARAMETER[gate]
    f = lambda x, p: gate(x, p) ** 2
    x, p = f32(3.0, 0.5)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(x, p), closed(6.0, 0.5))
    assert jax.jit(jax.grad(f, 1))(x, p) == 0
    sweep = jax.vmap(jax.grad(f), (None, 0))(x, f32(0.5, 2.0, 8.0))
    np.testing.assert_allclose(sweep, [closed(6.0, p) for p in (0.5, 2.0, 8.0)])

    def carried(x):
        step = lambda carry, _: ((gate(carry[0], carry[1]), carry[1] * 2), None)
        return jax.lax.scan(step, (x, jnp.float32(0.5)), None, length=3)[0][0] ** 2

    expected = closed(closed(closed(6.0, 2.0), 1.0), 0.5)
    np.testing.assert_allclose(jax.grad(carried)(jnp.float32(3.0)), expected)
    np.testing.assert_allclose(jax.jit(jax.grad(carried))(jnp.float32(3.0)), expected)


@pytest.mark.parametrize("scale", [2, 2.0, np.float64(2), np.int32(2), jnp.bfloat16(2)])
def test_kinds_of_scale(scale):
    grad = jax.grad(lambda x: sg.scale_gradient(x, scale) ** 2)
    assert grad(3.0) == 12
    assert grad(jnp.bfloat16(3)) == 12
    assert grad(jnp.bfloat16(3)).dtype == jnp.bfloat16


def test_a_wider_scale_rounds_once():
    x, scale = jnp.bfloat16(3.0), jnp.float32(1.00390625)  # 1 + 2**-8: 1 in bf16
    grad = jax.grad(lambda x: sg.scale_gradient(x, scale) * 3)(x)
    assert grad == jnp.bfloat16(3.0 * 1.00390625)
    assert grad != jnp.bfloat16(3.0)


def test_trees_of_scales_and_prefixes():
    tree = {"a": f32(1.0, 2.0), "b": (f32(3.0), 7, "name", None)}
    f = lambda floats, scale: sg.scale_gradient({**tree, "a": floats}, scale)["a"].sum()
    for scale in (
        3.0,
        {"a": 3.0, "b": 5.0},
        {"a": f32(3.0, 3.0), "b": (1, 1, 1, None)},
    ):
        np.testing.assert_array_equal(jax.grad(f)(tree["a"], scale), [3.0, 3.0])
    out = sg.scale_gradient(tree, 2.0)
    assert out["b"][1:] == (7, "name", None)


def test_leaves_without_gradient_are_left_alone(run):
    tree = {"w": 1.0, "n": 3, "on": True, "key": jax.random.key(0), "none": None}
    for gate in (sg.stop_gradient, sg.reverse_gradient, GATES["clip"], GATES["norm"]):
        out = gate(tree)
        assert (out["n"], out["on"], out["none"]) == (3, True, None)
        assert out["key"] is tree["key"]
    ints = run(lambda n: sg.scale_gradient((n, 1.0), 2.0)[0])(jnp.arange(3))
    assert ints.dtype == jnp.arange(3).dtype


def test_the_reversal_schedule():
    schedule = sg.reversal_schedule(100)
    p = np.array([0, 0.1, 0.5, 1.0])
    ours = [schedule(step) for step in (0, 10, 50, 100)]
    np.testing.assert_allclose(ours, 2 / (1 + np.exp(-10 * p)) - 1, rtol=1e-5)
    assert schedule(1000) == schedule(100)
    chained = optax.join_schedules([lambda step: 0.0, schedule], [10])
    np.testing.assert_allclose(jax.jit(chained)(60), ours[2], rtol=1e-6)
    with pytest.raises(ValueError, match=r"reversal_schedule[\s\S]*got: +0"):
        sg.reversal_schedule(0)


def test_prevent_gradient_names_the_line():
    def f(x, y):
        return sg.prevent_gradient(y, "labels are data") * x

    assert jax.grad(f)(2.0, 3.0) == 3
    wrapped = (lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda y: jax.vmap(f)(y))
    for wrap in wrapped:
        y = f32(3.0) if wrap is wrapped[-1] else 3.0
        grad = jax.grad(lambda y, w=wrap: jnp.sum(w(lambda y: f(2.0, y))(y)))
        with pytest.raises(TypeError, match=r"labels are data[\s\S]*test_gates.py:\d+"):
            grad(y)
    with pytest.raises(TypeError, match="no gradient may arrive here"):
        jax.jvp(lambda y: f(2.0, y), (3.0,), (1.0,))
    stopped = lambda y: jax.lax.stop_gradient(f(2.0, y)) + y
    assert jax.grad(stopped)(3.0) == 1


def test_gates_in_the_query():
    f = lambda x, s: sg.name(sg.scale_gradient(x, s), "h") ** 2
    grads = sg.gradients(f, {"x": "x", "s": "s", "h": "h"})(3.0, 0.5)
    assert grads["s"] is None
    assert (grads["x"], grads["h"]) == (3.0, 6.0)
    stopped = lambda p: sg.stop_gradient(p, "enc")["enc"] * p["head"]
    grads = sg.gradients(stopped, ["p/enc", "p/head"])({"enc": 2.0, "head": 3.0})
    assert grads == [None, 2.0]
    edited = sg.edit(lambda x: sg.name(x, "h") ** 2, {"h": sg.reverse_gradient})
    assert jax.grad(edited)(3.0) == -6


@pytest.mark.parametrize("scale", [np.uint8(1), jnp.uint8(1), True, jnp.array(True)])
def test_an_unsigned_scale_is_reversed(scale):
    assert jax.grad(lambda x: sg.reverse_gradient(x, scale))(2.0) == -1
    assert jax.jvp(lambda x: sg.reverse_gradient(x, scale), (2.0,), (1.0,))[1] == -1


def test_explicit_shardings():
    """Where shardings are part of the type, in jax.set_mesh."""
    explicit = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    gates = {
        "mask": lambda y: sg.mask_gradient(y, jnp.arange(8) > 2),
        "mask, one": lambda y: sg.mask_gradient(y, True),
        "scale": lambda y: sg.scale_gradient(y, 0.5),
        "clip": lambda y: sg.clip_gradient(y, -0.5, 0.5),
        "norm": lambda y: sg.clip_gradient_norm(y, 1.0),
        "nonfinite": sg.replace_nonfinite_gradient,
        "transform": lambda y: sg.transform_gradient(y, lambda ct: 2 * ct),
        "replace": lambda y: sg.replace_value(y, jnp.zeros(8)),
        "straight": lambda y: sg.straight_through(jnp.round)(y),
    }
    for name, gate in gates.items():
        f = lambda y, gate=gate: jnp.sum(gate(y) ** 2)
        y = jnp.arange(8.0)
        expected = jax.grad(f)(y)
        with jax.set_mesh(explicit):
            ours = jax.grad(f)(jax.device_put(y, NamedSharding(explicit, P("d"))))
            assert jax.typeof(ours).sharding.spec == P("d"), name
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=name)
