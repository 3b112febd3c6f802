"""The value of one thing, the derivative of another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, mesh

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "

QUANTIZERS = {
    "sign": jnp.sign,
    "round": jnp.round,
    "step": lambda x: x > 0,
    "int8": lambda x: jnp.clip(jnp.nan_to_num(x), -100, 100).astype(jnp.int8),
    "nearest": lambda x: f32(-1.0, 0.25, 2.0).astype(x.dtype)[
        jnp.argmin(jnp.abs(x[:, None] - f32(-1.0, 0.25, 2.0).astype(x.dtype)[None]), 1)
    ],
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_straight_through_is_the_quantizer(quantizer, dtype, run):
    x = every_value(dtype)
    g = sg.straight_through(quantizer)
    expected = run(quantizer)(x).astype(dtype)
    assert_same_bits(run(g)(x), expected)
    value, vjp = jax.vjp(run(g), x)
    assert_same_bits(value, expected)
    np.testing.assert_array_equal(vjp(jnp.full_like(x, 3))[0], 3)
    tangent = jax.jvp(run(g), (x,), (jnp.full_like(x, 3),))[1]
    np.testing.assert_array_equal(tangent, 3)


def test_the_textbook_line_is_not():
    x = every_value("bfloat16")
    line = x + jax.lax.stop_gradient(jnp.sign(x) - x)
    assert np.sum(np.array(line) != np.array(jnp.sign(x))) > 20_000
    assert np.isnan(line[x == jnp.inf]).all()


def test_straight_through_to_every_order():
    """Its derivatives are those of x -> f(x0) + g(x) - g(x0)."""
    f, g, x0 = jnp.round, jnp.sin, 1.3
    ours = lambda x: sg.straight_through(f, g)(x) ** 3
    meant = lambda x: (f(x0) + g(x) - g(x0)) ** 3
    for first in (jax.grad, jax.jacfwd):
        for second in (jax.grad, jax.jacfwd):
            for third in (jax.grad, jax.jacfwd):
                one = [first(f)(x0) for f in (ours, meant)]
                two = [second(first(f))(x0) for f in (ours, meant)]
                three = [third(second(first(f)))(x0) for f in (ours, meant)]
                np.testing.assert_allclose(*one, rtol=1e-5)
                np.testing.assert_allclose(*two, rtol=1e-5)
                np.testing.assert_allclose(*three, rtol=1e-4)


def test_what_backward_closes_over_learns():
    def f(x, w, v):
        g = sg.straight_through(lambda x: jnp.round(w * x), lambda x: v * x)
        return g(x)

    assert jax.grad(f, (0, 1, 2))(2.0, 3.0, 5.0) == (5.0, 0.0, 2.0)
    assert sg.gradients(f, ["x", "w", "v"])(2.0, 3.0, 5.0)[1] is None


def test_straight_through_of_trees_keywords_and_several_arguments():
    def forward(x, scale, bits=2):
        return {"q": jnp.round(x * scale), "codes": jnp.int32(x * 0 + bits)}

    def backward(x, scale, bits=2):
        return {"q": x * scale, "codes": scale * x}

    g = sg.straight_through(forward, backward)
    assert g(1.3, 2.0, bits=4) == {"q": 3.0, "codes": 4.0}
    grads = jax.grad(lambda x, s: sum(g(x, s, bits=4).values()), (0, 1))(1.3, 2.0)
    np.testing.assert_allclose(grads, (4.0, 2.6), rtol=1e-6)


def test_replace_value_of_trees(run):
    x = {"a": f32(1.0, 2.0), "n": 3, "s": 5.0}
    value = {"a": jnp.arange(2), "n": 4, "s": True}
    out = run(lambda a: sg.replace_value({**x, "a": a}, value)["a"])(x["a"])
    np.testing.assert_array_equal(out, [0.0, 1.0])
    assert sg.replace_value(x, value)["n"] == 4
    assert sg.replace_value(x, value)["s"] == 1.0
    same = jax.grad(lambda x: sg.replace_value(x, x) ** 2)(3.0)
    assert same == 6


def test_what_cannot_replace():
    x = f32(1.0)
    refused = {
        "value has the shape of x": (ValueError, lambda: sg.replace_value(x, 1.0)),
        "value has the dtype of x": (
            TypeError,
            lambda: sg.replace_value(x, jnp.ones(1, jnp.bfloat16)),
        ),
        "value has the structure of x": (
            ValueError,
            lambda: sg.replace_value({"a": x}, {"b": x}),
        ),
        "at least one leaf": (TypeError, lambda: sg.replace_value(3, 4)),
        "forward's result has the shape of the first argument": (
            ValueError,
            lambda: sg.straight_through(jnp.sum)(x),
        ),
        "a positional argument": (TypeError, lambda: sg.straight_through(lambda: 1)()),
    }
    for words, (kind, call) in refused.items():
        with pytest.raises(kind, match=words + BEATS):
            call()


# with_backward --------------------------------------------------------------------


def _cube_backward(ct, out, x):
    return (ct * 3 * out / x,)


def test_with_backward_to_third_order(run):
    cube = sg.with_backward(lambda x: x**3, _cube_backward)
    grad = jax.grad(lambda x: cube(x))
    np.testing.assert_allclose(run(cube)(2.0), 8)
    np.testing.assert_allclose(run(grad)(2.0), 12)
    np.testing.assert_allclose(run(jax.grad(grad))(2.0), 12)
    np.testing.assert_allclose(run(jax.grad(jax.grad(grad)))(2.0), 6)
    np.testing.assert_allclose(run(jax.jacrev(jax.jacrev(cube)))(2.0), 12)


def test_with_backward_takes_any_arguments():
    def fun(tree, n, name, *rest, factor=1.0, act=None):
        assert name == "name"
        assert int(n) == 2
        return {"y": tree["w"] * 2 * factor, "n": n}

    def backward(ct, out, tree, n, name, *rest, factor=1.0, act=None):
        assert ct["n"] is None
        assert callable(act)
        return (
            {"w": ct["y"] * 2 * factor, "k": None},
            None,
            None,
            *[None for _ in rest],
        )

    g = sg.with_backward(fun, backward)
    call = lambda w: g({"w": w, "k": 3}, 2, "name", 7.0, factor=5.0, act=jnp.tanh)["y"]
    assert call(1.0) == 10
    assert jax.grad(call)(1.0) == 10
    assert jax.jit(jax.grad(call))(1.0) == 10
    assert (
        g({"w": 1.0, "k": 3}, jnp.int32(2), "name", act=jnp.tanh)["n"].dtype == "int32"
    )
    assert g.__name__ == "fun"


def test_with_backward_takes_keywords_at_their_positions():
    seen = []

    def backward(ct, out, *args):
        seen.append([float(a) if isinstance(a, int | float) else None for a in args])
        return (ct, *[None] * (len(args) - 1))

    g = sg.with_backward(lambda x, a=1, b=2, c=3: x * b, backward)
    assert jax.grad(lambda x: g(x))(2.0) == 1
    assert jax.grad(lambda x: g(x, b=5))(2.0) == 1
    assert seen == [[None], [None, 1.0, 5.0]]  # x traced; a by default, b given, no c


def test_with_backward_closes_over_traced_values():
    def step(x, s):
        double = lambda x: sg.with_backward(
            lambda x: x * s, lambda ct, out, x: (ct * s * 10,)
        )(x)
        return jax.lax.cond(s > 0, double, lambda x: x, x), None

    f = lambda x, ss: jax.lax.scan(step, x, ss)[0]
    one, ss = jnp.float32(1.0), f32(2.0, 3.0)
    assert f(one, ss) == 6
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert jax.grad(wrap(f))(one, ss) == 600
    sweep = jax.vmap(jax.grad(f), (None, 0))(one, jnp.stack([ss, 2 * ss]))
    np.testing.assert_array_equal(sweep, [600.0, 2400.0])


def test_a_differentiated_closure_is_refused():
    f = lambda w: sg.with_backward(lambda x: x * w, lambda ct, out, x: (ct,))(2.0)
    assert f(3.0) == 6
    with pytest.raises(ValueError, match=r"function closes over[\s\S]*write: "):
        jax.grad(f)(3.0)
    as_argument = sg.with_backward(
        lambda x, w: x * w, lambda ct, out, x, w: (ct * w, ct * 100)
    )
    assert jax.grad(as_argument, 1)(2.0, 3.0) == 100


def test_with_backward_and_none():
    """None is unconnected, and seen to be so."""
    g = sg.with_backward(lambda x, y: x * y, lambda ct, out, x, y: (ct, None))
    assert sg.gradients(g, [0, 1])(2.0, 3.0) == [1.0, None]
    none = sg.with_backward(lambda x: x * 2, lambda ct, out, x: (None,))
    assert sg.gradients(none, 0)(2.0) is None
    assert jax.grad(none)(2.0) == 0


def test_with_backward_mapped_where_only_some_arguments_are():
    def backward(ct, out, w, x):
        return ct * x, ct * w

    g = sg.with_backward(lambda w, x: jnp.vdot(w, x), backward)
    xs = f32(1, 2, 3, 4, 5, 6).reshape(3, 2)
    w = f32(1.0, -1.0)
    f = lambda w, xs: jnp.sum(jax.vmap(g, (None, 0))(w, xs) ** 2)
    expected = jax.grad(lambda w, xs: jnp.sum((xs @ w) ** 2), (0, 1))(w, xs)
    for ours, theirs in zip(jax.grad(f, (0, 1))(w, xs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_with_backward_has_no_forward_mode():
    cube = sg.with_backward(lambda x: x**3, _cube_backward)
    for call in (
        lambda: jax.jvp(cube, (2.0,), (1.0,)),
        lambda: jax.jacfwd(cube)(2.0),
        lambda: jax.hessian(cube)(2.0),
        lambda: jax.jit(jax.jacfwd(cube))(2.0),
        lambda: jax.linearize(cube, 2.0)[1](1.0),
    ):
        with pytest.raises(TypeError, match="reverse mode" + BEATS):
            call()


def test_backwards_that_return_what_is_wrong():
    refused = {
        "a tuple of 1": lambda ct, out, x: ct,
        r"a tuple of 1,[\s\S]*got:   2\n": lambda ct, out, x: (ct, ct),
        "is a tree like it": lambda ct, out, x: ([ct["w"]],),
        r"the cotangent of argument 0 is \w32\[2\]": lambda ct, out, x: (
            {"w": ct["w"][:1], "n": None},
        ),
        r"the cotangent of argument 0 is f32\[2\], as": lambda ct, out, x: (
            {"w": ct["w"].astype(jnp.bfloat16), "n": None},
        ),
        "None for a leaf": lambda ct, out, x: (ct | {"n": jnp.zeros(())},),
    }
    x = {"w": f32(1.0, 2.0), "n": 3}
    for words, backward in refused.items():
        g = sg.with_backward(lambda x: x, backward)
        with pytest.raises(TypeError, match=words):
            g(x)  # before any derivative is taken
        with pytest.raises(TypeError, match=r"got: [\s\S]*write: "):
            jax.jit(lambda w, g=g: g({**x, "w": w}))(x["w"])


def test_no_gate_is_traced_again():
    traces = []

    def backward(ct, out, x):
        traces.append(1)
        return (ct,)

    f = jax.jit(jax.grad(lambda x: sg.with_backward(jnp.round, backward)(x)))
    f(1.0)
    count = len(traces)
    f(2.0)
    assert len(traces) == count


def test_a_keyword_only_argument_is_not_differentiated_in_silence():
    g = sg.with_backward(
        lambda x, *, scale: x * scale, lambda ct, out, x, *, scale: (ct * scale,)
    )
    assert jax.grad(lambda x: g(x, scale=3.0))(2.0) == 3
    with pytest.raises(ValueError, match="takes by keyword only"):
        jax.grad(lambda s: g(2.0, scale=s))(3.0)


def test_with_backward_in_shard_map():
    """A backward that sums over devices, and one that leaves it to us."""
    w, x = jnp.float32(2.0), f32(1.0, 2.0, 3.0, 4.0)

    def total(backward):
        g = sg.with_backward(lambda w, x: w * x, backward)

        def of_shard(w, x):
            return jax.lax.psum(jnp.sum(g(w, x) * x), "d")

        return jax.shard_map(
            of_shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P()
        )

    summed = lambda ct, out, w, x: (jax.lax.psum(jnp.sum(ct * x), "d"), ct * w)
    plain = lambda ct, out, w, x: (jnp.sum(ct * x), ct * w)
    for backward in (summed, plain):
        ours = jax.grad(total(backward), (0, 1))(w, x)
        assert float(ours[0]) == 30  # 1 + 4 + 9 + 16
        np.testing.assert_array_equal(ours[1], 2 * w * x)
    replicated = sg.with_backward(
        lambda x: jax.lax.psum(x**2, "d"), lambda ct, out, x: (ct * 2 * x,)
    )
    f = jax.shard_map(
        lambda x: jnp.sum(replicated(x)), mesh=mesh(), in_specs=P("d"), out_specs=P()
    )
    assert f(x) == 30
    np.testing.assert_array_equal(jax.grad(f)(x), 2 * x)


def test_a_complex_value_is_not_cut_to_a_real_one():
    with pytest.raises(TypeError, match="value has the dtype of x" + BEATS):
        sg.replace_value(1.0, 1j)
    g = sg.with_backward(jnp.sin, lambda ct, out, x: (2j,))
    with pytest.raises(TypeError, match="the cotangent of argument 0 is" + BEATS):
        g(1.0)


def test_cotangents_may_be_numbers_and_none_for_a_subtree():
    g = sg.with_backward(
        lambda tree: tree["a"]["x"] * tree["b"],
        lambda ct, out, tree: ({"a": None, "b": 2},),
    )
    grads = jax.grad(g)({"a": {"x": 3.0}, "b": 5.0})
    assert grads == {"a": {"x": 0.0}, "b": 2.0}
