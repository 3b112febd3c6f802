"""`check_gradients`: right derivatives pass, wrong ones are caught and named."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
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
    "fake quant": (lambda x: sg.quantize.fake_quant(x, -2.0, 2.0) ** 2, (X,)),
    "codebook": (_vector_quantized, (f32(0.1, 0.2, 1.1, 0.9).reshape(2, 2), CODES)),
}
REVERSE_ONLY = {
    "with_backward": (lambda x: right(x) * x, (X,)),
    "in a scan": (lambda x: lax.scan(lambda c, x: (right(c + x), c), 0.0, x), (X,)),
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
        with pytest.raises(AssertionError, match="the rule of with_backward"):
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


def _only_in_a_scan(x):
    step = lambda c, x: (c + jnp.where(x < 0, wrong_sign(x), x**2), None)
    return lax.scan(step, 0.0, x)[0]


@jax.custom_vjp
def textbook_reversal(x):
    return x


textbook_reversal.defvjp(lambda x: (x, None), lambda _, ct: (-ct,))

WRONG = {
    "custom_vjp": (wrong_sign, "wrong_sign"),
    "custom_jvp": (wrong_term, "wrong_term"),
    "with_backward": (half, "with_backward"),
    "in a scan": (_only_in_a_scan, "wrong_sign"),
    "in a branch": (lambda x: lax.cond(x[0] > 0, half, jnp.sin, x), "with_backward"),
    "in jit and remat": (jax.jit(jax.checkpoint(wrong_term)), "wrong_term"),
    "reversal": (lambda x: textbook_reversal(x) ** 2, "textbook_reversal"),
    "behind a stop": (lambda x: x + lax.stop_gradient(1.0) * wrong_term(x), "wrong"),
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
    if rule not in ("with_backward", "wrong"):
        assert "test_check.py:" in message


def test_both_numbers_are_told():
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(half)(f32(0.5))
    true, told = (
        float(part.split()[-1])
        for part in str(caught.value).split("\n")[0].split(" by ")[:2]
    )
    assert true == pytest.approx(2 * told, rel=1e-3)


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


REFUSED = {
    "order": ({"order": 0}, (X,), ValueError, ["order is 1 or 2", "got:   0"]),
    "mode": ({"modes": ("back",)}, (X,), ValueError, ['modes are "rev", "fwd"']),
    "string": ({"modes": "rev"}, (X,), ValueError, ['write: modes=("rev", "fwd")']),
    "allow": ({"allow": ["nobody"]}, (X,), ValueError, ['got:   "nobody"', "one of"]),
    "integers": ({}, (jnp.arange(3),), TypeError, ["an argument that carries"]),
    "bfloat16": (
        {},
        (X.astype(jnp.bfloat16),),
        TypeError,
        ['got:   a bf16[2] at "x"', "x.astype(jnp.float32)"],
    ),
    "complex": ({}, (X + 1j,), TypeError, ["float32 or float64"]),
    "forward mode": ({"modes": ("fwd",)}, (X,), TypeError, ['"with_backward"', "rev"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, args, error, words = REFUSED[name]
    function = (lambda x: right(x)) if name == "forward mode" else (lambda x: x * x)
    with pytest.raises(error) as caught:
        sg.check_gradients(function, **options)(*args)
    for word in words:
        assert word in str(caught.value)
    assert "\n  write: " in str(caught.value)


def test_tracers_and_integer_results_are_refused():
    with pytest.raises(TypeError, match="write: the call outside of"):
        jax.jit(lambda x: sg.check_gradients(jnp.sin)(x))(X)
    with pytest.raises(TypeError, match="returns at least one array of floats"):
        sg.check_gradients(jnp.argmax)(X)
