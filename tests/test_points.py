"""Naming, capturing, editing and perturbing values."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import EVERYWHERE, f32, mesh

import stopgrad_jax as sg

ARGS = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
H = np.tanh(np.array(ARGS[1]) * 0.7)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- name ---


def test_a_name_is_the_identity_and_policies_see_it():
    x = f32(jnp.inf, jnp.nan, -0.0)
    np.testing.assert_array_equal(np.signbit(sg.name(x, "h")), np.signbit(x))
    assert sg.name({"a": "text", "b": None}, "t") == {"a": "text", "b": None}
    policy = jax.checkpoint_policies.save_only_these_names("h")
    f = jax.checkpoint(lambda x: jnp.sin(sg.name(jnp.sin(x), "h")), policy=policy)
    saved = jax.make_jaxpr(lambda x: jax.vjp(f, x)[1](1.0))(1.0)
    assert str(saved).count("sin") < 5


def test_a_named_tree_keeps_its_shape():
    tree = {"a": 2.0, "b": (f32(1, 2), "text", None), "n": 3}
    f = lambda tree: sg.name(tree, "t")["a"] * 2
    _, values = sg.capture(f, ["t", "t/b", "t/b/0"])(tree)
    assert values["t"]["n"] == 3
    assert_same_bits(values["t"]["b"][:1], tree["b"][:1])
    assert values["t"]["b"][1:] == ("text", None) == values["t/b"][1:]
    assert_same_bits(values["t/b/0"], tree["b"][0])
    assert sg.gradients(f, "t")(tree) == {"a": 2.0, "b": (None, None, None), "n": None}


@pytest.mark.parametrize("name", ["", "a*", "0", "0/x", "return", "return/x", 3])
def test_names_that_could_not_be_addressed(name):
    with pytest.raises(ValueError, match=r"name\(tree, .*\n  got:.*\n  write: sg.name"):
        sg.name(1.0, name)


# -- capture ---


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_capture_everywhere(fun, run):
    out, values = run(sg.capture(fun, "h"))(*ARGS)
    np.testing.assert_allclose(out, np.sum(H**2), rtol=1e-6)
    np.testing.assert_allclose(values["h"], H, rtol=1e-6)


def test_a_branch_not_taken_captures_zeros():
    def f(index, x):
        branches = [lambda x: sg.name(x * 2, "h"), lambda x: sg.name(x * 3, "k")]
        return jax.lax.switch(index, branches, x)

    assert sg.capture(f, ["h", "k"])(1, 2.0)[1] == {"h": 0.0, "k": 6.0}
    assert sg.gradients(f, ["h", "k"])(1, 2.0) == [0.0, 1.0]


def test_captured_values_are_ordinary_outputs():
    f = lambda x: sg.name(x**2, "h") * 3
    assert jax.grad(lambda x: sg.capture(f, "h")(x)[1]["h"])(3.0) == 6.0
    assert_same_bits(jax.vmap(sg.capture(f, "h"))(f32(1, 2))[1]["h"], f32(1, 4))


def test_the_body_of_a_custom_rule_can_be_read():
    @jax.custom_vjp
    def rule(x):
        return sg.name(x**2, "inside") + 1

    rule.defvjp(lambda x: (x**2 + 1, None), lambda _, ct: (ct * 100,))
    f = lambda x: rule(x) * 2
    out, values = sg.capture(f, "inside")(3.0)
    assert (out, values["inside"]) == (20.0, 9.0)
    # and the rule stays what it is
    assert jax.grad(lambda x: sg.capture(f, "inside")(x)[0])(3.0) == 200.0
    for ask in (lambda: sg.gradients(f, "inside"), lambda: sg.edit(f, {"inside": abs})):
        with pytest.raises(ValueError, match=r'got:   "inside" in the body of one\n'):
            ask()(3.0)


# -- edit ---


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_an_edit_that_changes_nothing(fun, run):
    edited = sg.edit(fun, {"h": lambda h: h, "w": lambda w: w, "return": lambda y: y})
    plain = run(jax.value_and_grad(fun, argnums=(0, 1)))(*ARGS)
    assert_same_bits(run(jax.value_and_grad(edited, argnums=(0, 1)))(*ARGS), plain)


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_an_edit_acts_forward_and_backward(fun, run):
    edited = sg.edit(fun, {"h": lambda h: 3 * jax.lax.stop_gradient(h) + h})
    out, (dw, _) = run(jax.value_and_grad(edited, argnums=(0, 1)))(*ARGS)
    x = np.array(ARGS[1])
    np.testing.assert_allclose(out, np.sum((4 * H) ** 2), rtol=1e-6)
    np.testing.assert_allclose(dw, np.sum(8 * H * (1 - H**2) * x), rtol=1e-5)


def test_edits_close_over_traced_values():
    f = lambda x: jax.lax.scan(
        lambda c, _: (sg.name(c * 2.0, "h"), None), x, None, length=3
    )[0]
    g = lambda x, s: sg.edit(f, {"h": lambda h: h * s})(x)
    assert jax.jit(jax.grad(g, argnums=1))(*f32(1, 2)) == 3 * 8 * 4
    assert_same_bits(jax.vmap(g, (None, 0))(f32(1.0)[0], f32(1, 2)), f32(8, 64))


def test_edits_of_arguments_outputs_and_trees():
    f = lambda p, x: {"loss": p["w"] * x + p["b"], "n": 1}
    edited = sg.edit(
        f, {"p": lambda p: {**p, "b": p["b"] + 10}, "return/loss": lambda y: -y}
    )
    assert edited({"w": 2.0, "b": 1.0}, 3.0) == {"loss": -17.0, "n": 1}
    g = lambda x: sum(jax.tree.leaves(sg.name({"a": x, "b": 2 * x}, "t")))
    swap = sg.edit(g, {"t": lambda t: {"a": t["b"] * 5, "b": t["a"]}})
    assert swap(1.0) == 11.0
    assert sg.edit(g, {"t/a": lambda a: a * 4})(1.0) == 6.0


def test_an_edit_in_a_dynamic_while_loop_changes_the_forward_pass():
    def f(x, n):
        body = lambda c: (c[0] + 1, sg.name(c[1] * 2, "h"))
        return jax.lax.while_loop(lambda c: c[0] < n, body, (0, x))[1]

    assert sg.edit(f, {"h": lambda h: h + 1})(1.0, jnp.array(2)) == 7.0
    for ask in (sg.gradients, sg.capture):
        with pytest.raises(
            ValueError, match=r"got:   a while_loop, .*\n  write: jax.lax.scan"
        ):
            ask(f, "h")(1.0, jnp.array(2))


def test_an_edit_that_changes_the_type():
    f = lambda x: sg.name(x * 2, "h")
    with pytest.raises(
        TypeError, match=r'edit of "h" \(.*test_points.py:\d+\): .*f32\[2\]'
    ):
        sg.edit(f, {"h": lambda h: h.astype(jnp.bfloat16)})(f32(1, 2))
    with pytest.raises(TypeError, match=r"got:   f32\[1\]"):
        sg.edit(f, {"h": lambda h: h[:1]})(f32(1, 2))
    with pytest.raises(TypeError, match="returns a tree like its argument, "):
        sg.edit(lambda p: p["a"], {"p": lambda p: p["a"]})({"a": 1.0})


def test_leaves_that_are_not_traced_cannot_be_edited():
    f = lambda p, n: sg.name({"w": p["w"], "n": p["n"]}, "h")["w"] * n
    args = {"w": 1.0, "n": 2}, 3
    for edits in (
        {"n": lambda n: n + 1},
        {"p": lambda p: {**p, "n": 5}},
        {"h": lambda h: {**h, "n": 5}},
    ):
        with pytest.raises(TypeError, match=r"not traced.*\n|\n.*not traced"):
            sg.edit(f, edits)(*args)
    assert sg.edit(f, {"h": lambda h: {**h, "w": h["w"] * 2}})(*args) == 6.0


def test_a_jit_that_is_made_anew_keeps_its_shardings():
    sharding = jax.NamedSharding(mesh(8), jax.sharding.PartitionSpec("d"))
    f = jax.jit(lambda x: sg.name(x * 2, "h") + 1, out_shardings=sharding)
    x = jnp.ones(8, jnp.float32)
    assert sg.edit(lambda x: f(x), {"h": lambda h: h})(x).sharding == f(x).sharding


def test_an_edit_where_the_derivative_is_already_taken():
    f = lambda x: jax.grad(lambda x: sg.name(x**2, "h") ** 2)(x)
    with pytest.raises(ValueError, match=r"write: jax.grad\(sg.edit\(f, ...\)\)"):
        sg.edit(f, {"h": lambda h: h})(3.0)
    inner = sg.edit(lambda x: sg.name(x**2, "h") ** 2, {"h": lambda h: 2 * h})
    assert jax.jit(jax.grad(inner))(1.0) == 16.0


# -- operations: gradient_override_map, guided backprop, deconvnet ---


def test_an_operation_is_handed_over_with_its_operands():
    f = lambda x: jax.nn.relu(x) + jnp.round(x)
    doubled = sg.edit(f, {sg.op("relu"): lambda relu, x: relu(2 * x)})
    assert doubled(3.2) == np.float32(6.4) + 3
    through = {sg.op("round"): lambda op, x: x + jax.lax.stop_gradient(op(x) - x)}
    assert jax.grad(sg.edit(f, through))(3.2) == 2.0
    assert (
        sg.edit(lambda x: x * 3, {sg.op("mul"): lambda mul, a, b: mul(a, b) + 1})(2.0)
        == 7
    )


def test_within_a_scope_or_function():
    def encoder(x):
        return jnp.sin(x)

    def f(x):
        with jax.named_scope("head"):
            y = jnp.sin(x)
        return encoder(x) + 10 * y + 100 * jnp.sin(x)

    for within, expected in (("encoder", 1 + 0.0), ("head", 10.0)):
        edited = sg.edit(f, {sg.op("sin", within=within): lambda sin, x: x + sin(x)})
        assert edited(1.0) - f(1.0) == pytest.approx(expected, rel=1e-5)


def test_matches_only_in_the_body_of_a_rule():
    with pytest.raises(sg.AddressError, match="in the body of a custom rule only"):
        sg.edit(jax.nn.relu, {sg.op("max"): lambda op, *x: op(*x)})(1.0)


def convnet(image, kernels):
    x = image
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")
        x = jax.nn.relu(x)
    return jnp.sum(x**2)


def guided(relu, x):
    """Guided backpropagation: pass where both the input and the gradient are > 0."""

    @jax.custom_vjp
    def rule(x):
        return relu(x)

    rule.defvjp(
        lambda x: (relu(x), x), lambda x, ct: (jnp.where((x > 0) & (ct > 0), ct, 0),)
    )
    return rule(x)


def deconv(relu, x):
    """Deconvnet: a relu on the way back, whatever the input was."""

    @jax.custom_vjp
    def rule(x):
        return relu(x)

    rule.defvjp(lambda x: (relu(x), None), lambda _, ct: (jnp.maximum(ct, 0),))
    return rule(x)


@pytest.mark.parametrize(("rule", "name"), [(guided, "guided"), (deconv, "deconv")])
def test_gradient_override_on_a_convolutional_network(rule, name, run):
    keys = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], (1, 2, 6, 6), jnp.float32)
    kernels = [jax.random.normal(k, (2, 2, 3, 3), jnp.float32) for k in keys[1:]]
    edited = sg.edit(convnet, {sg.op("relu"): rule})
    found = run(jax.grad(edited))(image, kernels)

    # The closed form, layer by layer, with JAX's own transpose of the convolution.
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME")
    a1, back1 = jax.vjp(lambda x: conv(x, kernels[0]), image)
    a2, back2 = jax.vjp(lambda x: conv(x, kernels[1]), jnp.maximum(a1, 0))
    ct = 2 * jnp.maximum(a2, 0)
    for a, back in ((a2, back2), (a1, back1)):
        kept = (ct > 0) & (a > 0) if name == "guided" else ct > 0
        (ct,) = back(jnp.where(kept, ct, 0))
    np.testing.assert_allclose(found, ct, rtol=1e-5, atol=1e-4)
    assert_same_bits(run(edited)(image, kernels), run(convnet)(image, kernels))
    assert not np.allclose(found, jax.grad(convnet)(image, kernels))


# -- perturb ---


@pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_perturb_everywhere(fun, run):
    perturbed = run(sg.perturb(fun, "h"))
    zero = {"h": jnp.zeros(4, jnp.float32)}
    assert perturbed(zero, *ARGS) == run(fun)(*ARGS)
    np.testing.assert_allclose(jax.grad(perturbed)(zero, *ARGS)["h"], 2 * H, rtol=1e-6)


def test_perturbations_are_for_any_transform():
    f = sg.perturb(lambda x: sg.name(x**2, "h") ** 3, "h")
    zero = {"h": jnp.zeros((), jnp.float32)}
    x = f32(2.0)[0]
    assert jax.hessian(f)(zero, x)["h"]["h"] == 24.0
    assert jax.jvp(lambda p: f(p, x), (zero,), ({"h": x},))[1] == 3 * 16 * 2
    third = jax.grad(lambda d: jax.hessian(f)({"h": d}, x)["h"]["h"])
    assert third(zero["h"]) == 6.0
    batched = jax.vmap(jax.grad(f), (None, 0))(zero, f32(1, 2))
    np.testing.assert_allclose(batched["h"], [3.0, 48.0])


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"k": 0.0}, TypeError, 'a dict with keys "h"'),
        ({"h": jnp.zeros(3)}, TypeError, r"for .h. must be f32\[\]\n  got:   f"),
        ({"h": (0.0, 0.0)}, TypeError, "must be a tree like"),
    ],
)
def test_wrong_perturbations(given, kind, message):
    with pytest.raises(kind, match=message):
        sg.perturb(lambda x: sg.name(x**2, "h"), "h")(given, f32(2.0)[0])


# -- whole models ---


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = sg.name(nn.relu(nn.Dense(3)(x)), "h")
        return jnp.sum(nn.Dense(1)(x))


class Eqx(eqx.Module):
    linear: eqx.nn.Linear
    scale: float = 2.0

    def __call__(self, x):
        return jnp.sum(sg.name(jnp.tanh(self.linear(x)), "h")) * self.scale


def test_flax_linen():
    model = Linen()
    x = jnp.ones((2, 4), jnp.float32)
    params = model.init(jax.random.key(0), x)
    found = sg.gradients(model.apply, ["variables/params/Dense_*/kernel", "h"])(
        params, x
    )
    plain = jax.grad(model.apply)(params, x)["params"]
    assert_same_bits(
        found[0]["variables/params/Dense_1/kernel"], plain["Dense_1"]["kernel"]
    )
    kernel = params["params"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(found[1], np.broadcast_to(kernel.T, (2, 3)), rtol=1e-6)


def test_equinox():
    model = Eqx(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
    x = jnp.ones(3)
    fun = lambda model, x: model(x)
    found = sg.gradients(fun, {"m": "model", "h": "h"})(model, x)
    plain = jax.grad(fun)(model, x)
    assert_same_bits(found["m"].linear.weight, plain.linear.weight)
    np.testing.assert_allclose(found["h"], np.full(4, 2.0))
    np.testing.assert_allclose(sg.gradients(model, "h")(x), np.full(4, 2.0))


def test_an_nnx_variable_is_read_anew():
    scale = nnx.Param(jnp.array(2.0))
    grad = sg.gradients(lambda x: x * scale[...], "x")
    assert grad(1.0) == 2.0
    scale[...] = jnp.array(5.0)
    assert grad(1.0) == 5.0


# -- random programs ---

OPS = [
    jnp.sin,
    jnp.tanh,
    lambda x: x * 0.5 + 1,
    lambda x: x - jax.lax.stop_gradient(jnp.sin(x)),
    jax.nn.relu,
    jnp.round,
    jax.jit(lambda x: sg.name(jnp.cos(x), "k")),
    jax.checkpoint(lambda x: sg.name(x * x, "k")),
    lambda x: jnp.where(x > 0, x, jnp.exp(x)),
    lambda x: jax.lax.cond(x > 0, jnp.sin, lambda x: sg.name(-x, "k"), x),
    lambda x: jax.lax.scan(lambda c, _: (sg.name(c * 0.9, "k"), c), x, None, length=2)[
        0
    ],
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, len(OPS) - 1), min_size=1, max_size=8), st.integers(0, 7)
)
def test_random_programs(steps, at):
    def f(x):
        values = [x]
        for k, step in enumerate(steps):
            values.append(OPS[step](values[-1]) + 0.1 * values[k // 2])
            if k == at % len(steps):
                values[-1] = sg.name(values[-1], "h")
        return values[-1] * values[len(values) // 2]

    # Compiled, so that both sides are rounded by one program: outside jit, JAX runs
    # jnp's jitted helpers fused and the equations of a trace one by one.
    x = f32(0.3)[0]
    zero = {"unconnected_gradients": "zero"}
    plain = jax.jit(jax.value_and_grad(f))(x)
    edited = sg.edit(f, {"h": lambda h: h})
    assert_same_bits(jax.jit(jax.value_and_grad(edited))(x), plain)
    assert_same_bits(jax.jit(sg.value_and_gradients(f, "x", **zero))(x), plain)
    # Another result, or a hold in place of a stop, is another program: XLA may fuse it
    # otherwise, and then the last bits of a gradient are its own.
    value, found = jax.jit(sg.value_and_gradients(f, ["x", "h"], **zero))(x)
    assert_same_bits(value, plain[0])
    np.testing.assert_allclose(found[0], plain[1], rtol=1e-6, atol=1e-7)
    held = jax.jit(sg.gradients(f, "x", stop_gradients="h", **zero))(x)
    stopped = jax.jit(jax.grad(sg.edit(f, {"h": jax.lax.stop_gradient})))(x)
    np.testing.assert_allclose(held, stopped, rtol=1e-6, atol=1e-7)
    if sg.gradients(f, "x")(x) is None:
        assert plain[1] == 0


def test_a_partial_of_a_partial():
    f = functools.partial(lambda a, b, *, c: sg.name(a * b, "h") * c, c=2.0)
    assert sg.gradients(f, ["a", "h"], stop_gradients=["a", "h"])(1.0, 3.0) == [
        None,
        2.0,
    ]
