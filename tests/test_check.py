"""`check_gradients`: right derivatives pass, wrong ones are caught and named."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from programs import f32

import stopgrad_jax as sg

X = f32(0.3, -1.7)
pytestmark = pytest.mark.usefixtures("usual_settings")


def _scanned(x):
    def step(c, x):
        c = sg.straight_through(jnp.sign, jnp.tanh)(0.7 * c + x)
        return c, jax.nn.relu(c) * c

    return lax.scan(step, jnp.float32(0.3), x)[1]


def _while(x):
    body = lambda v: (v[0] + 1, jnp.sin(v[1]) + lax.stop_gradient(v[1]))
    return lax.while_loop(lambda v: v[0] < 3, body, (0, x))[1]


def _tree(params, x, n):
    hidden = jnp.tanh(params["w"] * x + params["b"][0])
    return {"loss": jnp.sum(hidden**n), "mean": jnp.mean(x), "count": n}


def _vector_quantized(z, codebook):
    out = sg.quantize.vector_quantize(z, codebook)
    return jax.tree.leaves(out)[0]


def _sharded(function):
    one = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=one, in_specs=P("i"), out_specs=P("i"))


def _inner(function):
    return lambda x: jax.grad(lambda x: jnp.sum(function(x) ** 3))(x)


right = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x),))
CODES = f32(0, 0, 1, 1, -1, 2).reshape(3, 2)

ORDINARY = {
    "sin": (jnp.sin, (X,)),
    "jit": (jax.jit(lambda x: jnp.exp(x) * x), (X,)),
    "scan": (lambda x: lax.scan(lambda c, x: (c * x + 1, c), 1.0, x), (X,)),
    "cond": (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), (X,)),
    "remat": (jax.checkpoint(lambda x: jnp.sin(jnp.exp(x))), (X,)),
    "vmap": (lambda x: jax.vmap(lambda a: a**3)(x), (X,)),
    "relu": (lambda x: jax.nn.relu(x) ** 2, (X,)),
    "softmax": (lambda x: jax.nn.softmax(x) * x, (X,)),
    "logsumexp": (jax.nn.logsumexp, (X,)),
    "norm": (jnp.linalg.norm, (X,)),
    "solve": (lambda x: jnp.linalg.solve(jnp.eye(2) * 3 + x[:, None], x), (X,)),
    "complex inside": (lambda x: jnp.abs(jnp.fft.fft(x)), (X,)),
    "tree": (_tree, ({"w": X, "b": (f32(0.5),)}, X, 3)),
}
DECLARED = {
    "stop": (lambda x: jnp.sum(x * lax.stop_gradient(x**2)), (X,)),
    "by hand": (lambda x: (x + lax.stop_gradient(jnp.round(x) - x)) ** 2, (X,)),
    "round": (lambda x: sg.straight_through(jnp.round)(x) * jnp.sin(x), (X,)),
    "replace": (lambda x: sg.replace_value(jnp.sin(x), 5.0 * x) ** 2, (X,)),
    "scale": (lambda x: sg.scale_gradient(x, 0.1) ** 3, (X,)),
    "reverse": (lambda x: sg.reverse_gradient(x) ** 3, (X,)),
    "mask": (lambda x: sg.mask_gradient(x, f32(1, 0) > 0) ** 3, (X,)),
    "scan": (_scanned, (X,)),
    "jit of remat": (jax.jit(jax.checkpoint(_scanned)), (X,)),
    "branch": (lambda x: lax.cond(x[0] > 0, _scanned, jnp.sin, x), (X,)),
    "spike": (lambda x: sg.surrogate.spike(x, sg.surrogate.atan()) * x, (X,)),
    "factor": (lambda x, s: sg.scale_gradient(x, s) ** 3, (X, f32(0.3, 2.0))),
    "factor of itself": (lambda x: sg.scale_gradient(x, x * x) ** 3, (X,)),
    "shard_map": (_sharded(lambda x: x * lax.stop_gradient(x)), (X,)),
    "inner gradient": (_inner(lambda x: sg.scale_gradient(x, 0.5)), (X,)),
    "inner stop": (_inner(lambda x: x * lax.stop_gradient(x)), (X,)),
    "fake quant": (lambda x: sg.quantize.fake_quant(x, -2.0, 2.0) ** 2, (X,)),
    "codebook": (_vector_quantized, (f32(0.1, 0.2, 1.1, 0.9).reshape(2, 2), CODES)),
}
REVERSE_ONLY = {
    "with_backward": (lambda x: right(x) * x, (X,)),
    "in a scan": (
        lambda x: lax.scan(lambda c, x: (right(c + x), c), jnp.float32(0), x),
        (X,),
    ),
    "in shard_map": (_sharded(lambda x: right(x) * x), (X,)),
    "in vmap": (lambda x: jax.vmap(right)(x) * x, (X,)),
    "clip in vmap": (jax.vmap(lambda x: sg.clip_gradient(x, -1e-3, 1e-3) ** 2), (X,)),
    "clip": (lambda x: sg.clip_gradient(jnp.sin(x), -1e-3, 1e-3) ** 2, (X,)),
    "norm": (lambda x: sg.clip_gradient_norm(jnp.sin(x), 1e-3) ** 2, (X,)),
    "transform": (lambda x: sg.transform_gradient(x, jnp.sign) ** 2, (X,)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_functions_pass(name):
    function, args = ORDINARY[name]
    sg.check_gradients(function, order=2, modes=("rev", "fwd"))(*args)


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_declared_is_followed(name):
    function, args = DECLARED[name]
    order = 1 if name in ("fake quant", "codebook") else 2
    sg.check_gradients(function, order=order, modes=("rev", "fwd"))(*args)


@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_gates_and_rules_pass(name):
    function, args = REVERSE_ONLY[name]
    sg.check_gradients(function, order=2)(*args)


def test_jaxs_own_checker_fails_there():
    for name in ("stop", "by hand", "round", "scale", "spike"):
        function, args = DECLARED[name]
        with pytest.raises(AssertionError):
            check_grads(function, args, order=1, modes=("rev",))


def test_while_in_forward_mode():
    sg.check_gradients(_while, modes=("fwd",))(X)


def test_float64_is_checked_closely():
    with jax.enable_x64(True):
        x = jnp.array([0.3, -1.7], jnp.float64)
        smooth = lambda x: sg.straight_through(jnp.round)(x) * jnp.sin(x)
        sg.check_gradients(smooth, order=2)(x)
        nearly = sg.with_backward(
            jnp.sin, lambda ct, out, x: (ct * jnp.cos(x) * 1.0001,)
        )
        with pytest.raises(AssertionError, match=r"the rule of with_backward\(sin\)"):
            sg.check_gradients(nearly)(x)


@jax.custom_vjp
def wrong_sign(x):
    return x**2


wrong_sign.defvjp(lambda x: (x**2, x), lambda x, ct: (-2 * x * ct,))


@jax.custom_jvp
def wrong_term(x):
    return jnp.sin(x) * x


wrong_term.defjvp(
    lambda primals, tangents: (wrong_term(*primals), jnp.cos(primals[0]) * tangents[0])
)
half = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x) / 2,))
wrong_sin = jax.custom_vjp(jnp.sin)
wrong_sin.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (-jnp.cos(x) * ct,))
_half_connected = sg.with_backward(
    lambda a, b: a * b, lambda ct, out, a, b: (b * ct, None)
)


def _only_in_a_scan(x):
    step = lambda c, x: (c + jnp.where(x < 0, wrong_sign(x), x**2), None)
    return lax.scan(step, 0.0, x)[0]


@jax.custom_vjp
def textbook_reversal(x):
    return x


textbook_reversal.defvjp(lambda x: (x, None), lambda _, ct: (-ct,))

RULE = "with_backward(sin)"
WRONG = {
    "custom_vjp": (wrong_sign, "wrong_sign"),
    "custom_jvp": (wrong_term, "wrong_term"),
    "with_backward": (half, "with_backward(sin)"),
    "in a scan": (_only_in_a_scan, "wrong_sign"),
    "in a branch": (lambda x: lax.cond(x[0] > 0, half, jnp.sin, x), RULE),
    "in jit and remat": (jax.jit(jax.checkpoint(wrong_term)), "wrong_term"),
    "in shard_map": (_sharded(wrong_sign), "wrong_sign"),
    "jnp's function": (wrong_sin, "sin"),
    "no cotangent": (lambda x: _half_connected(x, x), "with_backward(<lambda>)"),
    "reversal": (lambda x: textbook_reversal(x) ** 2, "textbook_reversal"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_caught_and_named(name):
    function, rule = WRONG[name]
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(X)
    message = str(caught.value)
    assert f"the rule of {rule}" in message
    assert "is not the derivative of its function" in message
    assert "by differences" in message
    assert "by the rule" in message
    if name not in ("with_backward", "in a branch", "jnp's function"):  # JAX calls it
        assert f"{rule} (" in message
        assert "test_check.py:" in message


def test_both_numbers_are_told():
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(half)(f32(0.5))
    true, told = (
        float(part.split()[-1])
        for part in str(caught.value).split("\n")[0].split(" by ")[:2]
    )
    assert true == pytest.approx(2 * told, rel=1e-3)


def test_numbers_that_are_nearly_the_same_are_told_apart():
    backward = lambda ct, out, x: (ct * 2.000004 * x,)
    with jax.enable_x64(True), pytest.raises(AssertionError) as caught:
        sg.check_gradients(sg.with_backward(jnp.square, backward))(jnp.float64(0.5))
    assert "1 by differences, 1.000002 by the rule" in str(caught.value)


def test_a_reading_in_which_the_function_raises_settles_nothing():
    def only_half(x):
        assert x == 0.5, "as solvers raise that do not get to an end"
        return x

    @jax.custom_jvp
    def checked(x):
        return jax.pure_callback(only_half, x, x)

    checked.defjvp(lambda x, dots: (checked(*x), *dots))
    with pytest.raises(AssertionError, match="the rule of with_backward"):
        sg.check_gradients(lambda x: half(x) * checked(lax.stop_gradient(x)))(f32(0.5))


def test_rules_of_narrow_and_of_complex_values():
    narrow = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x),))
    bf16 = lambda x: narrow(x.astype("bfloat16")).astype("float32")
    with pytest.raises(
        AssertionError, match=r"cannot be settled in float32.* only known to"
    ):
        sg.check_gradients(bf16)(X)  # too coarse to tell; but its rule is not accused
    turned = jax.custom_jvp(lambda z: z * z)
    for factor in (2, 1):
        turned.defjvp(lambda p, t, f=factor: (turned(*p), f * p[0] * t[0]))
        f = lambda x: jnp.abs(turned(x + 1j) + 1)
        if factor == 2:
            sg.check_gradients(f)(X)
            continue
        with pytest.raises(AssertionError, match="the rule of <lambda>"):
            sg.check_gradients(f)(X)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_strict_promotion_and_mixed_dtypes(x64):
    f = lambda a, b: (
        right(a),
        sg.scale_gradient(b, 2.0) ** 2,
        wrong_term(b) + right(b),
    )
    wide = jnp.float64 if x64 else jnp.float32
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        args = f32(1.3, -0.2), jnp.array([0.3, 1.0], wide)
        check = sg.check_gradients(f, order=2, allow=["wrong_term"])
        check(*args)


def test_what_is_allowed_is_followed():
    function = lambda x: wrong_sign(jnp.sin(x)) * x
    sg.check_gradients(function, allow=["wrong_sign"])(X)
    both = lambda x: wrong_sign(jnp.sin(x)) * half(x)
    with pytest.raises(AssertionError, match="the rule of with_backward"):
        sg.check_gradients(both, allow=["wrong_sign"])(X)
    reversal = lambda x: textbook_reversal(x) ** 2
    sg.check_gradients(reversal, allow=["textbook_reversal"])(X)


def test_the_textbook_reversal_fails_at_second_order():
    """Its second derivative is not that of any function with its first."""
    cube = lambda x: textbook_reversal(x) ** 3
    sg.check_gradients(cube, allow=["textbook_reversal"])(f32(2.0))
    with pytest.raises(AssertionError, match="second order"):
        sg.check_gradients(cube, order=2, allow=["textbook_reversal"])(f32(2.0))
    sg.check_gradients(lambda x: sg.reverse_gradient(x) ** 3, order=2)(f32(2.0))


def test_followed_rules_at_second_order():
    """The derivative that is declared is one at every point, so it has one itself."""
    product = lambda x, y: _half_connected(x, y) ** 2
    sg.check_gradients(product, order=2, allow=["with_backward"])(X, X)
    sg.check_gradients(wrong_sign, order=2, allow="wrong_sign")(X)
    sg.check_gradients(lambda x: half(x) ** 2, order=2, allow=["sin"])(X)


def test_second_order_in_forward_mode():
    """Reverse mode is not asked for, where there is none."""
    sg.check_gradients(_while, order=2, modes=("fwd",))(X)


def test_a_rule_in_a_dynamic_loop_is_compared():
    body = lambda v: (v[0] + 1, wrong_term(v[1]))
    f = lambda x: lax.while_loop(lambda v: v[0] < 3, body, (0, x))[1]
    with pytest.raises(AssertionError, match="the rule of wrong_term"):
        sg.check_gradients(f, modes=("fwd",))(X)


def test_one_small_entry_is_checked():
    backward = lambda ct, out, x: (ct * 2 * x * f32(*[1.0] * 3, 1.5, *[1.0] * 4),)
    x = jnp.linspace(1, 8, 8).at[3].set(0.01)
    wrong = sg.with_backward(jnp.square, backward)
    with pytest.raises(AssertionError, match=r"the rule of with_backward\(square\)"):
        sg.check_gradients(lambda x: jnp.sum(wrong(x)))(x)


@pytest.mark.parametrize("factor", [1.01, 1.003, 0.99])
def test_a_small_error_is_seen(factor):
    f = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x) * factor,))
    with pytest.raises(AssertionError, match="the rule of with_backward"):
        sg.check_gradients(f)(X)


def test_rounding_is_not_accused():
    line = lambda x: 1000 + 1e-2 * x
    f = sg.with_backward(line, lambda ct, out, x: (1e-2 * ct,))
    sg.check_gradients(f)(X)
    sg.check_gradients(lambda x: 1e4 + jnp.sum(x**2), order=2)(X)
    sg.check_gradients(lambda x: jnp.sum(jax.nn.softmax(x)))(X)


def test_the_borders_of_domains_are_not_crossed():
    sg.check_gradients(jnp.sqrt, order=2)(f32(1e-4, 1.0))
    sg.check_gradients(jnp.log)(f32(1e20, 1e10))


def test_many_kinks_are_no_fault():
    w, x = (jax.random.normal(jax.random.key(k), (16, 16)) for k in (0, 1))
    loss = lambda w, x: jnp.mean((jax.nn.relu(x @ w) @ w) ** 2)
    sg.check_gradients(loss, order=2)(w, x)


def test_chaos_is_told():
    w = jax.random.normal(jax.random.key(0), (16, 16))
    step = lambda c, _: (jnp.tanh(1.5 * w @ c), None)
    f = lambda x: lax.scan(step, x, None, length=50)[0]
    with pytest.raises(AssertionError, match="the differences are only known to"):
        sg.check_gradients(f)(jnp.ones(16))


def test_a_nonfinite_derivative_is_wrong():
    f = lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0)
    with pytest.raises(AssertionError, match="0 by differences, nan by JAX"):
        sg.check_gradients(f)(-1.0)


def test_a_kink_of_a_rule_is_told():
    f = sg.with_backward(
        lambda x: jnp.maximum(x, 0), lambda ct, out, x: (ct * (x > 0),)
    )
    with pytest.raises(AssertionError, match="at a kink: slope 0 on one side, 1 on"):
        sg.check_gradients(f)(0.0)
    sg.check_gradients(f)(0.5)


def test_a_kink_is_told():
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(jnp.abs)(jnp.float32(0.0))
    message = str(caught.value)
    assert "wrong derivative by x (rev)" in message or "by 0 (rev)" in message
    assert "the point is at a kink: slope " in message


def test_the_leaf_is_named():
    @jax.custom_vjp
    def product(a, b):
        return a * b

    product.defvjp(lambda a, b: (a * b, (a, b)), lambda r, ct: (r[1] * ct, 3 * r[0]))
    loss = lambda params, x: jnp.sum(product(params["w"], x))
    with pytest.raises(AssertionError, match="the rule of product"):
        sg.check_gradients(loss)({"w": X}, X)
    kink = lambda params: jnp.sum(params["w"]) + jnp.abs(params["b"][1])
    with pytest.raises(AssertionError, match=r"by params/b\[1\] \(rev\): "):
        sg.check_gradients(kink)({"w": X, "b": f32(1.0, 0.0)})
