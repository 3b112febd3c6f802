"""Gates that are not linear: second derivatives, norms over devices, optax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from programs import f32, mesh

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "


def test_second_derivatives_differ_by_nature():
    """Clip to 20 on x**3 at 2: 12 is passed, and 12 and 80 are second cotangents."""
    f = lambda x: sg.clip_gradient(x, -20.0, 20.0) ** 3
    h = lambda x: 10 * f(x)  # its cotangent, 120, is clipped
    assert jax.grad(f)(2.0) == 12
    assert jax.jvp(f, (2.0,), (1.0,))[1] == 12
    assert jax.jvp(h, (2.0,), (1.0,))[1] == 120  # tangents pass unchanged
    assert jax.grad(h)(2.0) == 20
    assert jax.jacfwd(jax.grad(f))(2.0) == 12
    assert jax.jacfwd(jax.grad(h))(2.0) == 0  # the plain derivative of a clipped value
    second = jax.grad(lambda x: 5 * jax.grad(f)(x))
    assert second(2.0) == 20  # 5 * 6 * 2 = 60, gated again
    assert jax.jvp(lambda x: 5 * jax.grad(f)(x), (2.0,), (1.0,))[1] == 60
    assert jax.grad(jax.jacfwd(h))(2.0) == 20  # 120, gated


def test_an_hvp_through_a_clip_is_not_linear():
    f = lambda x: jnp.sum(sg.clip_gradient(x, -20.0, 20.0) ** 2)
    x = f32(1.0, 2.0)
    hvp = lambda v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)
    np.testing.assert_array_equal(hvp(f32(1.0, 1.0)), [2.0, 2.0])
    np.testing.assert_array_equal(hvp(f32(100.0, 1.0)), [20.0, 2.0])


def test_the_gradient_of_a_norm_gate_is_right_at_zero():
    """A zero cotangent has a norm without derivative, and none is needed."""
    f = lambda x: jnp.sum(sg.clip_gradient_norm(x, 1.0) ** 2)
    x = jnp.zeros(3)
    np.testing.assert_array_equal(jax.grad(f)(x), 0)
    np.testing.assert_array_equal(jax.hessian(f)(x), 2 * np.eye(3))
    grad_of_grad = jax.grad(lambda x: jnp.sum(jax.grad(f)(x)))(x)
    np.testing.assert_allclose(grad_of_grad, 2 / np.sqrt(12), rtol=1e-6)  # (2, 2, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_norms_of_trees(dtype):
    """300 and 400 square to more than a float16 holds."""
    tree = {"a": jnp.array([300.0], dtype), "b": jnp.array(400.0, dtype), "n": 3}
    ct = {"a": tree["a"], "b": tree["b"]}

    def gate(a, b):
        out = sg.clip_gradient_norm({**tree, "a": a, "b": b}, 5.0)
        return {"a": out["a"], "b": out["b"]}

    _, vjp = jax.vjp(gate, *ct.values())
    for ours, expected in zip(vjp(ct), (3.0, 4.0), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.ravel(ours).astype(complex), expected, rtol=8e-3)


def test_norm_edges():
    pull = lambda ct, limit: jax.vjp(
        lambda x: sg.clip_gradient_norm(x, limit), jnp.zeros_like(ct)
    )[1](ct)[0]
    np.testing.assert_array_equal(pull(f32(3.0, 4.0), 5.0), [3.0, 4.0])
    np.testing.assert_array_equal(pull(f32(3.0, 4.0), 0.0), [0.0, 0.0])
    np.testing.assert_array_equal(pull(f32(0.0, 0.0), 0.0), [0.0, 0.0])
    np.testing.assert_array_equal(pull(f32(3.0, 4.0), jnp.inf), [3.0, 4.0])
    assert np.isnan(pull(f32(3.0, jnp.nan), 1.0)).all()
    assert pull(jnp.zeros((0,)), 1.0).shape == (0,)


def test_every_leaf_of_the_tree_counts_in_the_norm():
    """Also of leaves that nobody differentiates by."""
    f = lambda a, b: sum(sg.clip_gradient_norm((a, b), 1.0))
    np.testing.assert_allclose(jax.grad(f)(1.0, 2.0), 1 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(f, (0, 1))(1.0, 2.0), 1 / np.sqrt(2), rtol=1e-6)


# Over devices ---------------------------------------------------------------------

X = f32(3.0, 4.0, 5.0, 12.0, 8.0, 15.0, 7.0, 24.0).reshape(4, 2)


def _clipped(check, **options):
    def of_shard(x):
        y = sg.clip_gradient_norm(x, 1.0, **options)
        return jax.lax.psum(jnp.sum(y**2) / 2, "d")

    return jax.grad(
        jax.shard_map(
            of_shard, mesh=mesh(), in_specs=P("d"), out_specs=P(), check_vma=check
        )
    )


@pytest.mark.parametrize("check", [True, False])
def test_a_norm_over_shards(check):
    """Each shard to 1, so 2 in all; with axis_name 1 in all."""
    alone = _clipped(check)(X)
    expected = X / np.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    assert np.isclose(np.linalg.norm(alone), 2.0)
    together = _clipped(check, axis_name="d")(X)
    np.testing.assert_allclose(together, X / np.linalg.norm(X), rtol=1e-6)
    assert np.isclose(np.linalg.norm(together), 1.0)


def test_a_norm_over_shards_uses_one_collective():
    gate = lambda tree: sg.clip_gradient_norm(tree, 1.0, axis_name="d")
    pull = lambda x, y: jax.vjp(gate, (x, y))[1]((x, y))[0]
    for check in (True, False):
        sharded = jax.jit(
            jax.shard_map(
                pull, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=check
            )
        )
        text = sharded.lower(X, X).compile().as_text()
        assert len(re.findall(r"= .*\ball-reduce(?:-start)?\(", text)) == 1
        assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def test_a_norm_over_mapped_examples():
    f = jax.vmap(lambda x: sg.clip_gradient_norm(x, 1.0, axis_name="i"), axis_name="i")
    grad = jax.grad(lambda x: jnp.sum(f(x) ** 2) / 2)(X)
    np.testing.assert_allclose(grad, X / np.linalg.norm(X), rtol=1e-6)


def test_a_norm_over_an_axis_along_which_nothing_varies():
    gate = lambda w: sg.clip_gradient_norm(w, 1.0, axis_name="d")
    sharded = jax.shard_map(
        lambda w, x: jax.lax.psum(jnp.sum(gate(w) * x), "d"),
        mesh=mesh(),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=f"spread over 'd'{BEATS}"):
        sharded(X[0], X)
    mapped = jax.vmap(lambda x: jnp.sum(gate(X[0]) * x), axis_name="d")
    with pytest.raises(ValueError, match=f"mapped over 'd'{BEATS}"):
        mapped(X)
    with pytest.raises(NameError, match=f"axis_name is an axis{BEATS}"):
        gate(X)


# Functions and optax ---------------------------------------------------------------


def test_any_function_of_the_cotangent():
    tree = {"a": f32(1.0, 2.0), "n": 3, "b": jnp.float32(5.0)}
    seen = []

    def fn(ct):
        seen.append(jax.tree.map(jnp.shape, ct))
        return {**ct, "a": ct["a"] * ct["b"]}

    def f(a, b):
        out = sg.transform_gradient({**tree, "a": a, "b": b}, fn)
        return [out["a"], out["b"]]

    _, vjp = jax.vjp(f, tree["a"], tree["b"])
    a, b = vjp([f32(1.0, 1.0), jnp.float32(7.0)])
    np.testing.assert_array_equal(a, [7.0, 7.0])
    assert b == 7
    assert seen == [{"a": (2,), "b": (), "n": None}]  # traced once


@pytest.mark.parametrize(
    ("transformation", "closed"),
    [
        (optax.clip_by_global_norm(1.0), lambda ct: ct / np.linalg.norm(ct)),
        (optax.centralize(), lambda ct: ct - ct.mean(1, keepdims=True)),
        (optax.scale(-2.0), lambda ct: -2 * ct),
        (optax.clip(1.0), lambda ct: np.clip(ct, -1, 1)),
        (
            optax.chain(optax.clip(1.0), optax.scale(2.0)),
            lambda ct: 2 * np.clip(ct, -1, 1),
        ),
        (optax.identity(), lambda ct: ct),
    ],
)
def test_optax_transformations_without_state(transformation, closed, run):
    f = lambda x: jnp.sum(sg.transform_gradient(x, transformation) ** 2)
    np.testing.assert_allclose(run(jax.grad(f))(X), closed(2 * np.array(X)), rtol=1e-5)


# Errors ------------------------------------------------------------------------------

x = f32(1.0)
transform = sg.transform_gradient
REFUSED = {
    "min is at most max": (ValueError, lambda: sg.clip_gradient(1.0, 2.0, 1.0)),
    "a bound": (TypeError, lambda: sg.clip_gradient(1.0, None, None)),
    "complex numbers have no order": (TypeError, lambda: sg.clip_gradient(1j, 0, 1)),
    "min broadcasts": (ValueError, lambda: sg.clip_gradient(x, f32(1, 2), 3)),
    "max_norm is not negative": (ValueError, lambda: sg.clip_gradient_norm(1.0, -1.0)),
    "max_norm is a scalar": (ValueError, lambda: sg.clip_gradient_norm(1.0, x)),
    "max_norm is a real number": (TypeError, lambda: sg.clip_gradient_norm(1.0, "1")),
    "at least one leaf": (TypeError, lambda: sg.clip_gradient_norm(3, 1.0)),
    "without state": (ValueError, lambda: transform(x, optax.zero_nans())),
    "without state.*": (ValueError, lambda: transform(x, optax.adam(0.1))),
    "needs no parameters": (
        ValueError,
        lambda: transform(x, optax.add_decayed_weights(0.1)),
    ),
    "keeps shape and dtype": (TypeError, lambda: transform(x, lambda ct: ct[:0])),
    "keeps shape and dtype.*": (
        TypeError,
        lambda: transform(x, lambda ct: ct.astype(jnp.bfloat16)),
    ),
    "a tree like": (TypeError, lambda: transform(x, lambda ct: None)),
    "at least one leaf.*": (TypeError, lambda: sg.scale_gradient({}, 2.0)),
    "at least one leaf .*": (TypeError, lambda: sg.stop_gradient(jnp.arange(3))),
    "scale broadcasts": (ValueError, lambda: sg.scale_gradient(x, f32(1, 2))),
    "scale is real": (TypeError, lambda: sg.scale_gradient(x, 1j)),
    "scale is a number": (TypeError, lambda: sg.scale_gradient(x, "2")),
    "scale is one array": (
        ValueError,
        lambda: sg.scale_gradient({"a": 1.0}, {"b": 1.0}),
    ),
    "mask is one array": (
        ValueError,
        lambda: sg.mask_gradient({"a": 1.0}, {"b": True}),
    ),
    "mask is boolean": (TypeError, lambda: sg.mask_gradient(1.0, 0.5)),
    "mask broadcasts": (ValueError, lambda: sg.mask_gradient(x, f32(1, 2) > 1)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_right_is_refused(words, run):
    kind, call = REFUSED[words]
    with pytest.raises(kind, match=words + BEATS):
        run(lambda: call())()


def _sharded_sum(part):
    def of_shard(w, x):
        return jax.lax.psum(jnp.sum(part(w, x)), "d")

    return jax.shard_map(of_shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P())


@pytest.mark.skipif(
    jax.config.jax_check_tracer_leaks, reason="JAX reports plain JAX as a leak here"
)
def test_a_function_of_values_that_vary_over_different_axes():
    w, x = jnp.float32(2.0), f32(1.0, 2.0, 3.0, 4.0)
    closes_over_shards = _sharded_sum(
        lambda w, x: sg.transform_gradient(w, lambda ct: ct * x[0])
    )
    assert jax.grad(closes_over_shards)(w, x) == 10

    def product(w, x):
        w, x = sg.transform_gradient(
            (w, x), lambda ct: jax.tree.map(lambda c: 2 * c, ct)
        )
        return w * x

    np.testing.assert_array_equal(
        jax.grad(_sharded_sum(product), (0, 1))(w, x)[1], 4 * jnp.ones(4)
    )
    assert jax.grad(_sharded_sum(product))(w, x) == 20


def test_a_norm_over_an_axis_along_which_one_leaf_varies():
    gate = lambda w, x: sg.clip_gradient_norm((w, x), 1.0, axis_name="i")
    mapped = jax.vmap(gate, (None, 0), axis_name="i")
    with pytest.raises(ValueError, match=f"mapped over 'i'{BEATS}"):
        mapped(jnp.float32(1.0), X)
