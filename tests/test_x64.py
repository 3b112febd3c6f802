"""Functions that turn 64 bits on for a part of themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = [
    pytest.mark.usefixtures("usual_settings"),
    pytest.mark.filterwarnings("error:Explicitly requested dtype"),
]

X = f32(0.3, -0.7, 1.2)
WIDE = np.asarray(X, np.float64)


def plain(x):
    """The sum of the squares of `h`, which is sin(x) in 64 bits."""
    with jax.enable_x64(True):
        h = sg.name(jnp.sin(x.astype(jnp.float64)), "h")
        return jnp.sum(h * h).astype(jnp.float32)


def jitted(x):
    with jax.enable_x64(True):
        h = jax.jit(lambda v: sg.name(jnp.sin(v), "h"))(x.astype(jnp.float64))
        return jnp.sum(h * h).astype(jnp.float32)


def scanned(x):
    """The same, one entry of `x` after the other."""
    with jax.enable_x64(True):

        def step(total, v):
            h = sg.name(jnp.sin(v), "h")
            return total + h * h, None

        zero = jnp.zeros((), jnp.float64)
        total = jax.lax.scan(step, zero, x.astype(jnp.float64))[0]
        return total.astype(jnp.float32)


def branched(x):
    def wide(x):
        h = sg.name(jnp.sin(x), "h")
        return jnp.sum(h * h)

    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        return jax.lax.cond(x[0] > 0, wide, jnp.sum, x).astype(jnp.float32)


functions = pytest.mark.parametrize("fun", [plain, jitted, scanned, branched])
transforms = pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["", "jit"])


@transforms
@functions
def test_gradients_by_a_name(fun, run):
    found = run(sg.gradients(fun, "h"))(X)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, 2 * np.sin(WIDE), rtol=1e-14)
    both = run(sg.gradients(fun, ["h", "x"]))(X)
    np.testing.assert_allclose(both[0], 2 * np.sin(WIDE), rtol=1e-14)
    np.testing.assert_allclose(both[1], np.sin(2 * WIDE), rtol=1e-6)
    assert both[1].dtype == np.float32
    assert not jax.config.jax_enable_x64


@transforms
@functions
def test_an_edit_sees_64_bits(fun, run):
    edited = sg.edit(fun, {"h": lambda h: h * 2 + jnp.zeros(h.shape)})
    np.testing.assert_allclose(run(edited)(X), 4 * np.sum(np.sin(WIDE) ** 2), rtol=1e-6)
    expected = 4 * np.sin(2 * WIDE)
    np.testing.assert_allclose(run(jax.grad(edited))(X), expected, rtol=1e-6)
    operation = sg.edit(fun, {sg.op("sin"): lambda sin, v: sin(v * 2)})
    expected = np.sum(np.sin(2 * WIDE) ** 2)
    np.testing.assert_allclose(run(operation)(X), expected, rtol=1e-6)
    cast = sg.edit(fun, {"h": lambda h: h.astype("float32").astype("float64")})
    expected = np.sum(np.sin(WIDE) ** 2)
    np.testing.assert_allclose(run(cast)(X), expected, rtol=1e-6)


@functions
def test_a_perturbation_and_what_its_error_says_to_write(fun):
    perturbed, (_, values) = sg.perturb(fun, "h"), sg.capture(fun, ["h"])(X)
    with pytest.raises(TypeError) as caught:
        perturbed({"h": f32(0, 0, 0)}, X)
    write = "with jax.enable_x64(True): jax.tree.map(jax.numpy.zeros_like, value) of"
    assert f"write: {write} the value that sg.capture returns" in str(caught.value)
    with jax.enable_x64(True):
        zeros = jax.tree.map(jax.numpy.zeros_like, values)
    assert zeros["h"].dtype == np.float64
    np.testing.assert_allclose(perturbed(zeros, X), fun(X), rtol=1e-6)
    found = jax.grad(perturbed)(zeros, X)["h"]
    np.testing.assert_allclose(found, 2 * np.sin(WIDE), rtol=1e-14)


@transforms
@functions
def test_statistics(fun, run):
    stats = run(sg.gradient_stats(fun, ["h", "x"]))(X)
    expected = np.linalg.norm(2 * np.sin(WIDE))
    total = np.linalg.norm(stats["h"].norm)  # of a scan, one for each step
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    expected = np.linalg.norm(np.sin(2 * WIDE))
    np.testing.assert_allclose(stats["x"].norm, expected, rtol=1e-6)


def test_a_y_of_64_bits():
    found = sg.gradients(plain, "x", ys="h")(X)
    np.testing.assert_allclose(found, np.cos(WIDE), rtol=1e-6)
    with pytest.raises(TypeError, match=r"write: with jax\.enable_x64\(True\): jax\.n"):
        sg.gradients(plain, "x", ys="h", grad_ys=f32(1, 1, 1))(X)
    with jax.enable_x64(True):
        twos = 2 * jnp.ones_like(sg.capture(plain, "h")(X)[1]["h"])
    found = sg.gradients(plain, "x", ys="h", grad_ys=twos)(X)
    np.testing.assert_allclose(found, 2 * np.cos(WIDE), rtol=1e-6)


def test_no_gradient_is_64_zeros():
    def f(x):
        with jax.enable_x64(True):
            sg.name(x.astype(jnp.float64), "h")
        return jnp.sum(x)

    found = sg.gradients(f, "h", unconnected_gradients="zero")(X)
    assert (found.shape, found.dtype) == ((3,), np.float64)


def test_a_result_of_64_bits_is_edited():
    def f(x):
        with jax.enable_x64(True):
            return jnp.sin(x.astype(jnp.float64))

    found = sg.edit(f, {"return": lambda y: y * 2})(X)
    np.testing.assert_allclose(found, 2 * np.sin(WIDE), rtol=1e-14)


GATES = {
    "scale": (lambda h: sg.scale_gradient(h, 2.0), lambda ct: 2 * ct),
    "clip": (lambda h: sg.clip_gradient(h, -1.0, 1.0), lambda ct: np.clip(ct, -1, 1)),
    "replaced": (lambda h: sg.replace_value(h, h * 2), lambda ct: 2 * ct),
    "backward": (
        lambda h: sg.with_backward(lambda h: h * 1, lambda ct, out, h: (ct * 3,))(h),
        lambda ct: 3 * ct,
    ),
}


@transforms
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_in_64_bits(gate, run):
    gated, expected = GATES[gate]

    def f(x):
        with jax.enable_x64(True):
            h = gated(jnp.sin(x.astype(jnp.float64)))
            return jnp.sum(h * h).astype(jnp.float32)

    found = run(jax.grad(f))(X)
    expected = expected(2 * np.sin(WIDE)) * np.cos(WIDE)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sg.flow(f)(X).inputs[0].status == "flows"
