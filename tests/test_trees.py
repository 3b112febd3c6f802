"""Trees by `where`: one language, on every kind of tree."""

import dataclasses
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: jax.Array
    bias: jax.Array
    act: object


def odd_tree():
    """Strings, functions, ints, keys and None among the leaves."""
    return {
        "encoder": Block(jnp.ones((2, 2)), jnp.ones(2), jax.nn.relu),
        "head": {"kernel": jnp.ones(2), "lora_a": 2.0, "rate": 0.5},
        "name": "net",
        "step": 3,
        "on": True,
        "key": jax.random.key(0),
        "none": None,
        "x": [jnp.arange(2), np.float32(4)],
    }


ODD = {"encoder/kernel", "encoder/bias", "head/kernel", "head/lora_a", "head/rate"}
ODD |= {"x/1"}


def chosen(tree, where):
    """Paths of the leaves that are selected."""
    flat, _ = jax.tree_util.tree_flatten_with_path(sg.mask(tree, where))
    names = (jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat)
    return {name for name, (_, on) in zip(names, flat, strict=True) if on}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("encoder", {"encoder/kernel", "encoder/bias"}),
        ("head/kernel", {"head/kernel"}),
        ("**/kernel", {"encoder/kernel", "head/kernel"}),
        ("*/kernel", {"encoder/kernel", "head/kernel"}),
        ("head/lora_*", {"head/lora_a"}),
        ("**", ODD),
        ("!head", {"encoder/kernel", "encoder/bias", "x/1"}),
        ("!**/lora_*", ODD - {"head/lora_a"}),
        (["encoder/bias", "head/rate"], {"encoder/bias", "head/rate"}),
        (("encoder", "!**/kernel"), ODD - {"head/kernel"}),
        (["head/rate", "step"], {"head/rate"}),
        ("x/1", {"x/1"}),
        (lambda path, leaf: "kernel" in path, {"encoder/kernel", "head/kernel"}),
        (lambda path, leaf: getattr(leaf, "ndim", 0) == 2, {"encoder/kernel"}),
        (True, ODD),
    ],
)
def test_where_on_an_odd_tree(where, expected):
    tree = odd_tree()
    assert chosen(tree, where) == expected
    selected, rest = sg.partition(tree, where)
    assert len(jax.tree.leaves(selected)) == len(expected)
    whole = sg.combine(selected, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_boolean_tree_or_a_prefix_of_one():
    tree = {"a": {"w": 1.0, "n": 3}, "b": [2.0, 3.0]}
    assert chosen(tree, {"a": True, "b": False}) == {"a/w"}
    assert chosen(tree, {"a": True, "b": [False, np.True_]}) == {"a/w", "b/1"}
    assert chosen([1.0, 2.0], [True, False]) == {"0"}
    assert chosen([1.0, 2.0], 1) == {"1"}
    assert chosen(tree, sg.mask(tree, "b")) == {"b/0", "b/1"}


def test_equinox_modules():
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    first = {"layers/0/weight", "layers/0/bias"}
    assert chosen(model, "layers/0") == first
    stopped = sg.stop_gradient(model, "layers/0")
    assert isinstance(stopped, eqx.nn.MLP)
    x = jnp.ones(2)
    loss = lambda m: jnp.sum(sg.stop_gradient(m, "layers/0")(x) ** 2)
    grads = eqx.filter_grad(loss)(model)
    assert not jnp.any(grads.layers[0].weight)
    assert jnp.any(grads.layers[1].weight)
    train, rest = sg.partition(model, "!layers/0")
    grads = jax.grad(lambda t: jnp.sum(sg.combine(t, rest)(x) ** 2))(train)
    assert grads.layers[0].weight is None
    assert jnp.any(grads.layers[2].weight)


@pytest.mark.usefixtures("standard_promotion")
def test_flax_states():
    variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    assert chosen(variables, "params/kernel") == {"params/kernel"}
    assert chosen(FrozenDict(variables), "params/bias") == {"params/bias"}
    boxed = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b"))
    ).init(jax.random.key(0), jnp.ones((1, 2)))
    assert chosen(boxed, "params/kernel") == {"params/kernel/value"}

    class LoRA(nnx.Module):
        def __init__(self):
            self.base = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.lora = nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0))

    _, state = nnx.split(LoRA())
    by_kind = chosen(state, lambda path, leaf: isinstance(leaf, nnx.LoRAParam))
    assert by_kind == {"lora/lora_a/value", "lora/lora_b/value"}
    assert chosen(state, "base") == {"base/kernel/value", "base/bias/value"}


def test_stop_gradient_of_a_part():
    tree = odd_tree()

    def loss(head):
        stopped = sg.stop_gradient({**tree, "head": head}, "head/rate")["head"]
        return 2.0 * stopped["lora_a"] + 3.0 * stopped["rate"]

    grads = jax.grad(loss)(tree["head"])
    assert (grads["rate"], grads["lora_a"]) == (0, 2)


trees = st.recursive(
    st.one_of(
        st.floats(-3, 3), st.integers(-3, 3), st.booleans(), st.text("ab"), st.none()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "c d", "x"]), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(trees, st.integers(0, 7))
def test_combine_of_partition_is_the_tree(tree, remainder):
    where = lambda path, leaf: (len(path) + remainder) % 3 > 0
    try:
        selected, rest = sg.partition(tree, where)
    except sg.AddressError:
        wanted = jax.tree_util.tree_leaves_with_path(tree)
        printed = [
            jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in wanted
        ]
        pairs = zip(printed, jax.tree.leaves(tree), strict=True)
        assert not any(where(p, x) and isinstance(x, float) for p, x in pairs)
        return
    assert sg.combine(selected, rest) == tree
    assert all(isinstance(x, float) for x in jax.tree.leaves(selected))
    mask = sg.mask(tree, where)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(selected))


REFUSED = {
    "which matches nothing[^$]*encoder/kernel": (sg.AddressError, "kernel"),
    "which matches nothing[^$]*head/kernel": (sg.AddressError, "head/kernal"),
    r"which matches nothing[^$]*write: \"\*\*/lora_\*\"": (sg.AddressError, "lora_*"),
    "carries a gradient[^$]*none where 'step'": (sg.AddressError, "step"),
    "carries a gradient[^$]*none where '!": (sg.AddressError, "!**"),
    "carries a gradient": (sg.AddressError, False),
    "carries a gradient[^$]*function": (sg.AddressError, lambda path, leaf: False),
    "where is a path, a list": (ValueError, {"encoder": True}),
    "where is a path, a list[^$]*float": (TypeError, 0.5),
    r"asked of each leaf: \(path, leaf\)": (TypeError, lambda m: m),
    "selects leaves of a tree": (TypeError, sg.point("head")),
    "which matches nothing": (sg.AddressError, ["head", "tail"]),
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("take", [sg.mask, sg.partition, sg.stop_gradient])
def test_a_where_that_cannot_be_right(words, take):
    kind, where = REFUSED[words]
    with pytest.raises(kind, match=words) as error:
        take(odd_tree(), where)
    assert "\n  got:   " in str(error.value) or ": got" in str(error.value)
    assert "\n  write: " in str(error.value)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=f"one of the two parts{BEATS}"):
        sg.combine({"a": 1.0}, {"a": 2.0})
    with pytest.raises(ValueError, match=f"both parts have one structure{BEATS}"):
        sg.combine({"a": 1.0}, {"b": None})


def test_keys_with_slashes_and_stars():
    haiku = {"mlp/linear": {"w": 1.0}, "mlp": {"w": 2.0}, "out": {"w": 3.0}}
    assert chosen(haiku, "mlp") == {"mlp/w"}
    assert chosen(haiku, "!mlp") == {"mlp/linear/w", "out/w"}
    assert chosen(haiku, "mlp/linear") == {"mlp/linear/w"}
    assert chosen({"a*": 1.0, "ab": 2.0}, "a*") == {"a*"}
    assert chosen({"!a": 1.0, "b": 2.0}, "!a") == {"!a"}
    with pytest.raises(sg.AddressError, match=f"a path means one place{BEATS}"):
        sg.mask({"a/b": 1.0, "a": {"b": 2.0}}, "a/b")
    with pytest.raises(sg.AddressError, match=r'write: "mlp/linear"'):
        sg.mask({"mlp/linear": {"w": 1.0}}, "mlp")
    with pytest.raises(sg.AddressError, match=r"the tree is one leaf\n  write: "):
        sg.stop_gradient(jnp.ones(2), "w")


def test_predicates_of_other_kinds():
    starts = jax.tree_util.Partial(lambda head, path, leaf: path.startswith(head), "a")
    assert chosen({"a": 1.0, "b": 2.0}, starts) == {"a"}
    with pytest.raises(TypeError, match=f"answers True or False{BEATS}"):
        sg.mask({"a": jnp.ones(2)}, lambda path, leaf: leaf > 0)


def test_places_that_are_printed_alike_can_be_told_apart():
    tree = {"a/b": 1.0, "a": {"b": 2.0, "": 3.0}}
    assert chosen(tree, "['a/b']") == {"a/b"}
    with pytest.raises(sg.AddressError) as caught:
        sg.mask(tree, "a/b")
    (write,) = re.findall(r"write: (.*)", str(caught.value))
    spelled = [part.strip('"') for part in write.split(" or ")]
    selected = [sg.partition(tree, path)[0] for path in spelled]
    assert selected == [
        {"a/b": None, "a": {"b": 2.0, "": None}},
        {"a/b": 1.0, "a": {"b": None, "": None}},
    ]
    assert sg.partition(tree, "a/['']")[0]["a"] == {"b": None, "": 3.0}
    assert sg.partition(tree, "a/*")[0]["a"] == {"b": 2.0, "": 3.0}
    assert sg.mask({"": 1.0, "b": 2.0}, "['']") == {"": True, "b": False}
