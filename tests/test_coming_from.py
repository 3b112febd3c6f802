"""`docs/coming-from.md` is run: each block, each "here", and what the text claims."""

import functools
import pathlib
import re

import equinox as eqx
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import stopgrad_jax as sg

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "coming-from.md"

# What each row must give, by hand. A tree is {path: value} of its numbers, where one
# number stands for an array of it; None and functions in a tree have no entry.
MLP = ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]
MLP_GRADIENTS = dict(zip(MLP, ([[1, 2]] * 3, 1, 4, 1), strict=True))
MLP_TRAINED = dict(zip(MLP, (1, 1, 1 - 0.5 * 4, 1 - 0.5 * 1), strict=True))
KERNEL = [[1] * 3, [2] * 3]
LINEN_WRITTEN = {"0": 2, "1/batch_stats/mean": 1.5, "1/batch_stats/var": 2.5}
NNX = "first/kernel first/bias norm/scale norm/bias last/kernel last/bias".split()
NNX = [f"{path}/value" for path in NNX]
NNX_GRADIENTS = dict(zip(NNX, ([[4] * 3, [8] * 3], 2, 0, 2, 12, 2), strict=True))
NNX_TRAINED = dict(zip(NNX, (1, 0, 1, 0, 1 - 0.5 * 12, -0.5 * 2), strict=True))
NNX_STATISTICS = {"norm/mean/value": 0, "norm/var/value": 1}
# Half way, since momentum is 0.5, from there to the batch's 6 and 9 (linen: 3 and 4).
NNX_WRITTEN = {"norm/mean/value": 3, "norm/var/value": 5, "drop/rngs/count/value": 1}
EXPECTED = {
    "TensorFlow 1": {
        "tf.gradients(y, [w, h])": [108, 24],
        "tf.gradients(y, b) where b is unused": None,
        "tf.gradients(y, xs, stop_gradients=xs)": [36, 24],
        "tf.gradients([y, h], x, grad_ys=[None, 10.0])": 68,
        "tf.gradients(tf.gradients(y, x), x)": 16,
        "tf.stop_gradient(x)": 3,
        "tf.stop_gradient in code you may not edit": 36,
        'graph.gradient_override_map({"Relu": "Guided"})': [1, 0, 0],
        'tf.raw_ops.PreventGradient(input=x, message="data")': TypeError("data"),
        "tf.grad_pass_through(tf.round)(x)": 4,
        "tf.custom_gradient(softplus)": 1,
    },
    "PyTorch": {
        "loss.backward(); w.grad": 72,
        "h.retain_grad(); h.grad": 24,
        "torch.autograd.grad(y, (w, b), allow_unused=True)": [6, None],
        "h.detach()": 3,
        "with torch.no_grad():": 144,
        "p.requires_grad_(False), not to compute a gradient": {"head": 4},
        "p.requires_grad_(False), not to train": {"encoder": 4, "head": 2.87},
        "h.register_hook(torch.sign)": 1,
        "h.register_hook(torch.sign) in code you may not edit": 3,
        "module.register_forward_hook(...)": {"0": 144, "1/h": 12},
        "clip_grad_value_(h, 1.0)": 2,
        "clip_grad_norm_(h, 1.0)": [0.6, 0.8],
        "class Cube(torch.autograd.Function)": 2,
    },
    "Equinox": {
        "eqx.partition(mlp, eqx.is_inexact_array)": {f"0/{k}": 1 for k in MLP},
        "eqx.partition(mlp, last_bias)": {f"{int(k != MLP[3])}/{k}": 1 for k in MLP},
        "eqx.combine(arrays, others)": dict.fromkeys(MLP, 1),
        "eqx.filter_grad(loss)(mlp, x)": MLP_GRADIENTS,
        "eqx.filter_grad(loss)(mlp, x).layers[1].bias": [1],
        "eqx.filter_jit(eqx.filter_grad(loss))(mlp, x)": MLP_GRADIENTS,
        "eqx.tree_at(lambda m: m.layers[0], mlp, replace_fn=...) in the loss": (
            MLP_GRADIENTS | dict.fromkeys(MLP[:2], 0)
        ),
        "optimizer.init(eqx.filter(mlp, ...)), then eqx.apply_updates": MLP_TRAINED,
    },
    "Flax linen": {
        'jax.grad(net.apply)(variables, x)["params"]["Dense_0"]["kernel"]': KERNEL,
        "jax.grad(net.apply, argnums=1)(variables, x)": [3, 3],
        "jax.grad(net.apply)(variables, x) at every kernel": {
            "variables/params/Dense_0/kernel": KERNEL,
            "variables/params/Dense_1/kernel": 3,
        },
        'self.perturb("h", h)': [1, 1, 1],
        'self.sow("intermediates", "h", h)': {"h": [3, 3, 3]},
        "jax.grad(..., has_aux=True) with mutable=": LINEN_WRITTEN,
        "optax.multi_transform(...) with optax.set_to_zero()": {
            **{"params/Dense_0/kernel": 1, "params/Dense_0/bias": 0},
            **{"params/Dense_1/kernel": 1 - 0.5 * 3, "params/Dense_1/bias": -0.5},
        },
        'path_aware_map(lambda path, x: "Dense_0" in path, variables["params"])': {
            f"Dense_{k}/{leaf}": k == 0 for k in (0, 1) for leaf in ("kernel", "bias")
        },
        "nn.with_partitioning(...), and other boxes": {
            **dict.fromkeys(("params/Dense_0/bias", "params/Dense_1/bias"), False),
            **{f"params/Dense_{k}/kernel/value": True for k in (0, 1)},
        },
    },
    "Flax nnx": {
        "nnx.grad(Net.__call__)(Net(), x)": NNX_GRADIENTS,
        "what nnx.grad leaves in the module": NNX_WRITTEN,
        "nnx.grad(Net.__call__, argnums=nnx.DiffState(0, "
        'nnx.PathContains("last")))(Net(), x)': {k: NNX_GRADIENTS[k] for k in NNX[4:]},
        'self.perturb("h", h)': [[1] * 3] * 2,
        'self.sow(nnx.Intermediate, "h", h)': {"h": [[3] * 3, [9] * 3]},
        "nnx.split_state(nnx.state(Net()), nnx.BatchStat, ...)[0]": NNX_STATISTICS,
        'step(optax.sgd(0.5), wrt=nnx.PathContains("last"))': NNX_TRAINED,
    },
}


@functools.cache
def page():
    """Return {section: source of its blocks} and {(section, there): (there, here)}."""
    head, *sections = PAGE.read_text().split("\n## ")
    fence = re.compile(r"```python\n(.*?)```", re.DOTALL)
    blocks, rows = {}, {}
    for section in sections:
        title = section.split("\n")[0]
        blocks[title] = "\n".join(fence.findall(head) + fence.findall(section))
        for line in re.findall(r"^\| (?!there)(.*) \|$", section, re.MULTILINE):
            there, here, _ = line.split(" | ")
            assert re.fullmatch("`[^`]+`", here)
            row = title, there.replace("`", "")
            assert row not in rows
            rows[row] = there, here.strip("`")
    return blocks, rows


@functools.cache
def names(section):
    """Run a section's blocks once."""
    namespace = {}
    exec(page()[0][section], namespace)
    return namespace


def numbers(tree):
    """Return {path: leaf} of the leaves of a tree that are numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in flat
        if isinstance(leaf, bool | int | float)
        or jnp.issubdtype(getattr(leaf, "dtype", str), jnp.number)
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-5)


# A cell that is one piece of code is run too, where its framework is at hand.
IDS = [(section, there) for section, rows in EXPECTED.items() for there in rows]
RUN_THERE = [
    (section, there)
    for section, there in IDS
    if section not in ("TensorFlow 1", "PyTorch") and not there.startswith("self.")
    if page()[1].get((section, there), [""])[0] == f"`{there}`"
]


def test_every_row_of_the_page_is_tested():
    assert sorted(page()[1]) == sorted(IDS)
    assert len(RUN_THERE) == 13


@pytest.mark.parametrize(("section", "there"), IDS, ids=map("-".join, IDS))
def test_a_row_gives_what_it_must(section, there):
    here, expected = page()[1][section, there][1], EXPECTED[section][there]
    if isinstance(expected, Exception):
        with pytest.raises(type(expected), match=str(expected)):
            eval(here, names(section))
        return
    with jax.numpy_dtype_promotion("standard"):  # `optax.adamw` is not strict
        found = eval(here, names(section))
    if expected is None or isinstance(found, list):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        expected = numbers(expected)
    elif not isinstance(expected, dict):
        expected = {"": expected}
    assert_same(numbers(found), expected)


@pytest.mark.parametrize(("section", "there"), RUN_THERE, ids=map("-".join, RUN_THERE))
def test_there_and_here_are_one(section, there):
    here = page()[1][section, there][1]
    theirs, ours = (numbers(eval(code, names(section))) for code in (there, here))
    assert theirs
    assert_same(ours, theirs)


# What the text says beside the rows -------------------------------------------------


def test_none_is_only_where_nothing_connects():
    f = lambda x, b: jnp.round(x) + jnp.float32(x > 1) + jnp.float32(jnp.int32(x))
    assert sg.gradients(f, "x")(jnp.float32(2.0), 1.0) is None
    assert sg.gradients(lambda x: 0 * x, "x")(2.0) == 0
    assert sg.gradients(lambda x: x**2, "x")(jnp.array([3.0, 4.0])).tolist() == [6, 8]
    unused = functools.partial(sg.gradients, f, "b")
    assert unused(unconnected_gradients="zero")(jnp.float32(2.0), 1.0) == 0
    with pytest.raises(ValueError, match="b: "):
        unused(unconnected_gradients="error")(jnp.float32(2.0), 1.0)


def test_an_operation_can_be_overridden_in_a_part():
    def f(x):
        with jax.named_scope("encoder"):
            x = jax.nn.relu(x)
        return jax.nn.relu(3.0 * x)

    tenfold = lambda relu, x: 10.0 * relu(x)
    assert sg.edit(f, {sg.op("relu", within="encoder"): tenfold})(1.0) == 30
    assert sg.edit(f, {sg.op("relu"): tenfold})(1.0) == 300


def test_none_from_a_backward_pass_and_errors_where_others_are_silent():
    product = sg.with_backward(lambda x, y: x * y, lambda ct, _, x, y: (ct * y, None))
    assert jax.grad(product, argnums=(0, 1))(2.0, 3.0) == (3, 0)
    with pytest.raises(TypeError, match="stop_gradient"):
        sg.stop_gradient({"step": 3})
    with pytest.raises(TypeError, match="a tree like its argument"):
        jax.grad(lambda x: sg.transform_gradient(x, lambda ct: None))(1.0)
    assert eqx.combine({"a": 1.0}, {"a": 2.0}) == {"a": 1.0}
    with pytest.raises(ValueError, match='two leaves at "a"'):
        sg.combine({"a": 1.0}, {"a": 2.0})


def test_equinox_modules_hold_functions():
    n = names("Equinox")
    mlp, loss, x = n["mlp"], n["loss"], n["x"]
    for where in (lambda m: m.layers[1].bias, eqx.is_array):
        with pytest.raises(TypeError, match=r"write: .*path, leaf"):
            sg.partition(mlp, where)
    assert eqx.tree_equal(sg.mask(mlp, n["last_bias"]), n["last_bias"])
    half = lambda mlp, x: jnp.sum(mlp.layers[0](x))
    assert sg.gradients(half, "mlp/layers/1/bias")(mlp, x) is None
    assert eqx.filter_grad(half)(mlp, x).layers[1].bias == 0
    with pytest.raises(TypeError):
        jax.jit(sg.gradients(loss, "mlp"))(mlp, x)
    frozen, grads = sg.freeze(optax.sgd(0.5), "layers/0"), sg.gradients(loss, 0)(mlp, x)
    updates, _ = frozen.update(grads, frozen.init(mlp), mlp)
    with pytest.raises(TypeError, match="unsupported operand"):
        optax.apply_updates(mlp, updates)


def test_linen_addresses():
    n = names("Flax linen")
    apply, boxed, args = n["net"].apply, n["boxed"], (n["variables"], n["x"])
    with pytest.raises(sg.AddressError, match="variables/params/Dense_0/kernel"):
        sg.gradients(apply, "params/Dense_0/kernel")(*args)
    assert_same(numbers(sg.gradients(apply, "args/0")(*args)), {"": [3, 3]})
    kernels = numbers(sg.mask(boxed, "params/*/kernel/value"))
    for where in ("params/*/kernel", lambda _, x: isinstance(x, nn.Partitioned)):
        assert numbers(sg.mask(boxed, where)) == kernels


class Tied(nnx.Module):
    def __init__(self):
        self.a = self.b = nnx.Param(jnp.array(2.0))

    def __call__(self, x):
        return self.a[...] ** 2 * self.b[...] * x  # 3 a^2 x = 36 at x = 3


def test_a_tied_parameter_of_a_whole_nnx_module_is_two_leaves():
    apart, graphdef, state = {"a/value": 24, "b/value": 12}, *nnx.split(Tied())
    assert_same(numbers(sg.gradients(Tied.__call__, 0)(Tied(), 3.0)), apart)
    assert_same(numbers(jax.grad(Tied.__call__)(Tied(), 3.0)), apart)
    assert_same(numbers(nnx.grad(Tied.__call__)(Tied(), 3.0)), {"a/value": 36})
    f = lambda state, x: nnx.merge(graphdef, state)(x)
    assert_same(numbers(sg.gradients(f, "state")(state, 3.0)), {"a/value": 36})


def test_what_a_whole_nnx_module_writes_is_lost():
    n = names("Flax nnx")
    net, x = n["Net"](), n["x"]
    written = lambda: (float(net.norm.mean[...][0]), int(net.drop.rngs.count[...]))
    sg.gradients(n["Net"].__call__, 0)(net, x)
    jax.grad(n["Net"].__call__, allow_int=True)(net, x)
    nnx.grad(lambda net: sg.stop_gradient(net, "first")(x))(net)
    assert written() == (0.0, 0)
    for grad in (jax.grad, functools.partial(sg.gradients, xs="x")):
        with pytest.raises(flax.errors.TraceContextError):
            grad(lambda x: net(x))(x)
    aux = sg.gradients(n["loss"], "params", has_aux=True)(n["params"], n["rest"], x)[1]
    nnx.update(net, aux)
    assert written() == (3.0, 1)


def test_nnx_predicates_get_variables_and_optimizers_get_none():
    n, seen = names("Flax nnx"), {}
    where = lambda path, leaf: seen.setdefault(path, type(leaf)) is nnx.Param
    assert all(numbers(sg.mask(n["params"], where)).values())
    assert seen["last/kernel/value"] is nnx.Param
    with pytest.raises(sg.AddressError, match='write: "first'):
        n["step"](sg.freeze(optax.sgd(0.5), "first/kernel/value"))
