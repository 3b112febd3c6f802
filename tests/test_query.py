"""The laws of `gradients`: the same everywhere, total, partial, local, precise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from programs import EVERYWHERE, f32, mesh

import stopgrad_jax as sg

P = jax.sharding.PartitionSpec


def assert_close(a, b, rtol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), a, b
    )


# -- the same gradients in every way of writing a program -------------------------


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_same_gradients_everywhere(fun, run):
    w, x = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
    h = np.tanh(np.array(x) * 0.7)
    out, found = run(sg.value_and_gradients(fun, {"w": "w", "h": "h", "x": 1}))(w, x)
    through = 2 * h * (1 - h**2)
    assert_close(out, jnp.sum(h**2))
    assert_close(found, {"w": np.sum(through * x), "h": 2 * h, "x": through * 0.7})


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_a_stop_holds_everywhere(fun, run):
    w, x = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
    found = run(sg.gradients(fun, {"w": "w", "h": "h"}, stop_gradients="h"))(w, x)
    h = np.tanh(np.array(x) * 0.7)
    np.testing.assert_allclose(found["h"], 2 * h, rtol=1e-6)
    # The other branch of `cond` and `switch` returns w: connected, here with zero.
    assert found["w"] is None or found["w"] == 0


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_asking_never_changes_the_plain_gradient(fun, run):
    w, x = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
    plain = run(jax.grad(fun, argnums=(0, 1)))(w, x)
    for xs, pick in ((["w", "x"], slice(2)), (["w", "x", "h"], slice(2))):
        assert_close(tuple(run(sg.gradients(fun, xs))(w, x)[pick]), plain)


OUTER = {
    "jit": lambda f: jax.jit(f),
    "vmap": lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, x[None])[0],
    "vmap of jit": lambda f: (
        lambda w, x: jax.vmap(jax.jit(f), (None, 0))(w, x[None])[0]
    ),
    "scan": lambda f: (
        lambda w, x: jax.lax.scan(lambda c, x: (c, f(w, x)), 0, x[None])[1][0]
    ),
    "remat": jax.checkpoint,
    "cond": lambda f: lambda w, x: jax.lax.cond(True, f, f, w, x),
}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER.keys())
@pytest.mark.parametrize("inner", ["plain", "scan", "remat", "cond", "jit"])
def test_under_outer_transforms(outer, inner):
    w, x = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
    grad = sg.gradients(EVERYWHERE[inner], "h", stop_gradients="h")
    np.testing.assert_allclose(outer(grad)(w, x), 2 * np.tanh(x * w), rtol=1e-6)


@pytest.mark.parametrize("inner", ["plain", "remat", "vmap", "jit"])
def test_under_outer_shard_map(inner):
    w, x = f32(0.7)[0], jnp.arange(16, dtype=jnp.float32) / 16
    grad = sg.gradients(EVERYWHERE[inner], "h")
    specs = {"mesh": mesh(), "in_specs": (P(), P("d")), "out_specs": P("d")}
    found = jax.jit(jax.shard_map(grad, **specs))(w, x)
    np.testing.assert_allclose(found, 2 * np.tanh(x * w), rtol=1e-6)


@pytest.mark.parametrize("inner", ["plain", "scan", "remat", "cond", "jit"])
@pytest.mark.parametrize(
    "mode", [jax.jacfwd, jax.jacrev, jax.grad], ids=lambda m: m.__name__
)
def test_a_stop_is_local_to_its_call(mode, inner):
    """d/dw of dy/dh at the held h = tanh(x w) is that of the function 2 tanh(x w)."""
    w, x = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
    grad = sg.gradients(EVERYWHERE[inner], "h", stop_gradients="h")
    if mode is jax.grad:
        found = mode(lambda w: jnp.sum(grad(w, x)))(w)
        expected = np.sum(2 * (1 - np.tanh(x * w) ** 2) * x)
    else:
        found, expected = mode(grad)(w, x), 2 * (1 - np.tanh(x * w) ** 2) * x
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_nested_levels_law():
    def z(x):
        h = sg.name(x * x, "h")
        return h * h * x

    inner = sg.gradients(z, "x", stop_gradients="h")
    assert inner(2.0) == 16.0
    assert jax.grad(inner)(2.0) == 32.0
    assert sg.gradients(inner, "x")(2.0) == 32.0
    assert jax.grad(jax.jit(inner))(2.0) == 32.0
    # and a stop of the outer level at the same point
    assert sg.gradients(inner, "x", stop_gradients="h")(2.0) is None
    # to the third order: d2/dx2 of h*h at fixed meaning h = x^2 is 12 x^2
    assert jax.grad(jax.grad(inner))(2.0) == 48.0


# -- total and partial, None, several of everything ---------------------------------


def test_total_counts_paths_through_later_points():
    def f(x):
        a = sg.name(x + 0.0, "a")
        b = sg.name(2 * a, "b")
        return a + b

    assert sg.gradients(f, ["a", "b"])(0.0) == [3.0, 1.0]
    assert sg.gradients(f, ["a", "b"], stop_gradients=["a", "b"])(0.0) == [1.0, 1.0]


def test_a_y_that_is_an_x_contributes_its_cotangent():
    def f(x):
        y = sg.name(2 * x, "y")
        return sg.name(x + y, "z")

    assert sg.gradients(f, ["x", "y"], ys=["y", "z"])(1.0) == [5.0, 2.0]
    assert sg.gradients(f, "x", ys="x")(1.0) == 1.0
    assert sg.gradients(f, "y", ys="y", stop_gradients="y")(1.0) == 1.0
    assert sg.gradients(f, "x", ys="y", stop_gradients="y")(1.0) is None


def test_duplicates():
    f = lambda x: sg.name(x * x, "h")
    assert sg.gradients(f, ["x", "x"])(3.0) == [6.0, 6.0]
    assert sg.gradients(f, "x", ys=["h", "h"])(3.0) == 12.0
    assert sg.gradients(f, ["h", "h"])(3.0) == [1.0, 1.0]


def test_several_ys_are_summed_and_weighted():
    f = lambda x: {"a": x**2, "b": 3 * x, "c": sg.name(x * f32(1, 2), "c")}
    assert sg.gradients(f, "x", ys="return/a")(2.0) == 4.0
    assert sg.gradients(f, "x", ys="return")(2.0) == 4 + 3 + 3
    assert sg.gradients(f, "x", ys=["return/a", "return/b"])(2.0) == 7.0
    weights = {"ys": ["return/a", "c"], "grad_ys": [None, f32(0, 10)]}
    assert sg.gradients(f, "x", **weights)(2.0) == 24.0
    assert sg.gradients(f, "x", ys="return/b", grad_ys=5.0)(2.0) == 15.0


NONE = {
    "stopped": lambda x: jax.lax.stop_gradient(x) * 2,
    "rounded": lambda x: jnp.round(x) * 2,
    "floor": lambda x: jnp.floor(x),
    "cast": lambda x: (3 * x).astype(int).astype(jnp.float32),
    "compared": lambda x: jnp.where(x > 0, jnp.float32(1), jnp.float32(2)),
    "argmax": lambda x: jnp.argmax(jnp.stack([x, x * 2])).astype(jnp.float32),
    "overwritten": lambda x: (
        jnp.zeros(2, jnp.float32).at[0].set(x).at[0].set(jnp.float32(1)).sum()
    ),
    "unused": lambda x: jnp.float32(3),
    "not selected": lambda x: jax.lax.select(True, jax.lax.stop_gradient(x), x),
    "one_hot": lambda x: jax.nn.one_hot(x.astype(int), 3)[0],
    "sampled": lambda x: jax.random.categorical(
        jax.random.key(0), jnp.stack([x, 0 * x])
    ).astype(jnp.float32),
    "zero rule": lambda x: _zero_rule(x) * 2,
    "zero bwd": lambda x: _zero_bwd(x) * 2,
}
CONNECTED = {
    "times zero": lambda x: x * 0,
    "branch not taken": lambda x: jax.lax.cond(False, jnp.sin, lambda x: x, x),
    "dead relu": lambda x: jax.nn.relu(-x),
    "clipped": lambda x: jnp.clip(x, 5, 6),
    "no rounds": lambda x: jax.lax.fori_loop(0, 0, lambda i, c: c * 2, x),
    "plain": jnp.sin,
}


@jax.custom_jvp
def _zero_rule(x):
    return jnp.sin(x)


_zero_rule.defjvp(lambda p, t: (_zero_rule(*p), jnp.zeros_like(t[0])))


@jax.custom_vjp
def _zero_bwd(x):
    return jnp.sin(x)


_zero_bwd.defvjp(lambda x: (jnp.sin(x), None), lambda _, ct: (None,))


@pytest.mark.parametrize("fun", NONE.values(), ids=NONE.keys())
def test_structurally_zero_is_none(fun, run):
    assert run(sg.gradients(fun, "x"))(f32(2.0)[0]) is None
    zero = run(sg.gradients(fun, "x", unconnected_gradients="zero"))(f32(2.0)[0])
    assert (zero.dtype, zero) == (jnp.float32, 0)


@pytest.mark.parametrize("fun", CONNECTED.values(), ids=CONNECTED.keys())
def test_numerically_zero_is_connected(fun, run):
    x = f32(2.0)[0]
    assert run(sg.gradients(fun, "x"))(x) == jax.grad(fun)(x)


def test_none_is_precise_through_scan_carries():
    def f(a, b, c, d):
        def step(carry, x):
            a, b, c = carry
            # a feeds itself, b feeds a, c is stopped on its way into itself
            return (a + b, b * x, jax.lax.stop_gradient(c) * x), None

        (a, _, c), _ = jax.lax.scan(step, (a, b, c), d)
        return {"a": a, "c": c}

    args = (*f32(1, 2, 3), f32(1, 2))
    found = sg.gradients(f, ["a", "b", "c", "d"], ys="return/a")(*args)
    assert found[0] == 1.0
    assert found[1] == 2.0
    assert found[2] is None
    np.testing.assert_allclose(found[3], [2.0, 0.0])
    found = sg.gradients(f, ["a", "b", "c", "d"], ys="return/c")(*args)
    assert found[:3] == [None, None, None]
    np.testing.assert_allclose(found[3], [0.0, 3.0])


def test_none_is_precise_through_branches():
    def f(p, a, b, c):
        return (
            jax.lax.cond(p, lambda: a * 2, lambda: jax.lax.stop_gradient(b) + a) + c * 0
        )

    found = sg.gradients(f, ["a", "b", "c"])(True, 1.0, 2.0, 3.0)
    assert found == [2.0, None, 0.0]


def test_trees_keep_their_structure_and_other_leaves_their_values():
    def f(params, n, train, act, cfg=None):
        assert (n, train, cfg) == (3, True, "big")
        h = params["w"] * params["n"] if train else 0.0
        return act(h) * n

    params = {"w": 2.0, "n": 5, "unused": f32(1.0), "s": "text"}
    call = (params, 3, True, jnp.sin)
    found = sg.gradients(f, "params")(*call, cfg="big")
    np.testing.assert_allclose(found["w"], 15 * np.cos(10.0), rtol=1e-6)
    assert (found["n"], found["unused"], found["s"]) == (None, None, None)
    found = sg.gradients(f, "params", unconnected_gradients="zero")(*call, cfg="big")
    assert jnp.issubdtype(found["n"].dtype, jnp.integer)
    assert found["unused"].shape == (1,)


def test_integer_arrays_get_none_or_integer_zeros():
    f = lambda x, i: x[i] * 2
    x, i = f32(1, 2), jnp.array(1)
    assert sg.gradients(f, "i")(x, i) is None
    zero = sg.gradients(f, "i", unconnected_gradients="zero")(x, i)
    assert (zero.dtype, zero.shape) == (i.dtype, ())


def test_wildcards_yield_full_addresses():
    def f(params, x):
        for k in range(2):
            layer = params[f"Dense_{k}"]
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
        return jnp.sum(sg.name(x, "Dense_out"))

    leaf = {"kernel": jnp.eye(2), "bias": jnp.ones(2)}
    args = ({"Dense_0": leaf, "Dense_1": leaf, "scale": 1.0}, jnp.ones((1, 2)))
    found = sg.gradients(f, "params/Dense_*/kernel")(*args)
    plain = jax.grad(f)(*args)
    assert_close(
        found,
        {f"params/Dense_{k}/kernel": plain[f"Dense_{k}"]["kernel"] for k in (0, 1)},
    )
    assert set(sg.gradients(f, "params/**/bias")(*args)) == {
        "params/Dense_0/bias",
        "params/Dense_1/bias",
    }
    assert set(sg.gradients(f, "Dense_*")(*args)) == {"Dense_out"}


def test_addresses_of_every_kind_of_argument():
    def f(a, *args, b=1.0, **kwargs):
        return a * 2 + args[0] * 3 + args[1]["w"] * 4 + b * 5 + kwargs["c"] * 6

    call = functools.partial(f, b=2.0)
    xs = ["a", 0, "args/0", "args/1/w", "1", "kwargs/c"]
    assert sg.gradients(call, xs)(1.0, 1.0, {"w": 1.0}, c=1.0) == [2, 2, 3, 4, 3, 6]

    class Model:
        w = 3.0

        def __call__(self, x):
            return self.w * x

        def method(self, x):
            return self.w * x

    assert sg.gradients(Model(), "x")(1.0) == 3.0
    assert sg.gradients(Model().method, "x")(1.0) == 3.0
    assert sg.gradients(jnp.sin, 0)(0.0) == 1.0
    assert sg.gradients(jax.jit(lambda q: q * 2), "q")(0.0) == 2.0


def test_names_of_other_libraries_are_points():
    f = lambda x: checkpoint_name(x**2, "theirs") * 3
    assert sg.gradients(f, "theirs")(2.0) == 3.0


def test_operations_are_addresses_too():
    f = lambda x: jnp.sin(x) * 3 + jnp.sin(2 * x)
    assert sg.gradients(f, sg.op("sin"))(1.0) == (3.0, 1.0)


def test_loops_give_one_axis_each_and_repeats_a_tuple():
    def f(x):
        def outer(c, i):
            def inner(c, j):
                c = sg.name(c * 2.0, "h")
                return c, None

            return jax.lax.scan(inner, c, jnp.arange(3))[0], None

        c = jax.lax.scan(outer, x, jnp.arange(2))[0]
        return sg.name(c * 1.0, "h")

    first, last = sg.gradients(f, "h")(1.0)
    np.testing.assert_allclose(first, 2.0 ** np.array([[5, 4, 3], [2, 1, 0]]))
    assert last == 1.0


def test_reverse_and_unrolled_scans():
    def f(x, **kwargs):
        def step(c, x):
            return sg.name(c * x, "h"), None

        return jax.lax.scan(step, jnp.ones((), x.dtype), x, **kwargs)[0]

    x = f32(2, 3, 4, 5)
    np.testing.assert_allclose(sg.gradients(f, "h")(x), [60, 20, 5, 1])
    np.testing.assert_allclose(sg.gradients(f, "h")(x, reverse=True), [1, 2, 6, 24])
    np.testing.assert_allclose(sg.gradients(f, "h")(x, unroll=2), [60, 20, 5, 1])


def test_a_jitted_layer_shared_by_many_calls():
    @jax.jit
    def block(x):
        return sg.name(jnp.sin(x), "h")

    def f(x):
        for _ in range(3):
            x = block(x)
        return x

    found = sg.gradients(f, "h")(0.5)
    x2 = np.sin(np.sin(0.5))
    np.testing.assert_allclose(
        found, [np.cos(np.sin(0.5)) * np.cos(x2), np.cos(x2), 1.0], rtol=1e-6
    )


def test_a_point_inside_a_part_that_is_already_differentiated():
    def f(x):
        return jax.grad(lambda x: sg.name(x**2, "h") ** 2)(x)  # 2 h * 2 x

    assert sg.gradients(f, "h")(3.0) == 12.0
    assert sg.capture(f, "h")(3.0) == (4 * 27.0, {"h": 9.0})


def test_references_are_followed():
    def f(x):
        ref = jax.new_ref(jnp.zeros((), jnp.float32))
        ref[...] = sg.name(x * 2, "h")
        return ref[...] * 3

    assert sg.gradients(f, ["x", "h"])(f32(1.0)[0]) == [6.0, 3.0]


@pytest.mark.skipif(
    jax.config.jax_check_tracer_leaks,
    reason="JAX 0.10.2 and 0.12.0.1 report plain jax.grad of this function as a leak",
)
def test_references_are_followed_through_scans():
    def f(x):
        ref = jax.new_ref(jnp.zeros(3, jnp.float32))

        def step(c, i):
            ref[i] = sg.name(c, "h")
            return c * 2, None

        jax.lax.scan(step, x, jnp.arange(3))
        return ref[...].sum()

    found = sg.gradients(f, ["x", "h"])(f32(1.0)[0])
    assert found[0] == 7.0
    np.testing.assert_allclose(found[1], [1, 1, 1])


def test_has_aux_and_whole_value():
    f = lambda x: (x**2, {"metric": x * 3, "n": 1})
    grads, aux = sg.gradients(f, "x", has_aux=True)(2.0)
    assert (grads, aux) == (4.0, {"metric": 6.0, "n": 1})
    value, grads = sg.value_and_gradients(f, "x", has_aux=True)(2.0)
    assert (value, grads) == ((4.0, {"metric": 6.0, "n": 1}), 4.0)
    value, grads = sg.value_and_gradients(f, "x", ys="return/1/metric")(2.0)
    assert (value[0], grads) == (4.0, 3.0)


def test_complex_gradients_follow_jax():
    z = jnp.array(1 + 2j, jnp.complex64)
    f = lambda z: jnp.abs(z) ** 2 + jnp.real(z)
    np.testing.assert_allclose(sg.gradients(f, "z")(z), jax.grad(f)(z))
    ct = jnp.array(1 - 1j, jnp.complex64)
    found = sg.gradients(lambda z: z**3, "z", grad_ys=ct)(z)
    np.testing.assert_allclose(found, jax.vjp(lambda z: z**3, z)[1](ct)[0])
