"""What is said of a `where` and of a path that are spelled wrong, and to write."""

import collections
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from test_suggestions import addresses

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
Pair = collections.namedtuple("Pair", "a b")
PARAMS = {"mlp_0": {"w": 1.0}, "mlp_2": {"w": 1.0}, "norm": 2.0, "n": 3}


# Trees of booleans ------------------------------------------------------------------

NO_PREFIX = {
    "list for a namedtuple": (Pair(1.0, 2.0), [], "[], where the tree is Pair(a="),
    "namedtuple": (Pair(1.0, 2.0), (True, False), "(True, False), where"),
    "dict": ({"a": 1.0}, (), "(), where the tree is {'a': 1.0}"),
    "keys": ({"a": 1.0}, {"q": True}, "{'q': True}, where"),
    "leaf": (1.0, [], "[], where the tree is 1.0"),
    "length": ([1.0, 2.0], [True], "[True], where"),
    "below": ({"x": [1.0, 2.0], "y": 1.0}, {"x": [True], "y": True}, '[True] at "x"'),
    "beside a prefix": (
        {"x": [1.0, 2.0], "y": {"z": 1.0}},
        {"x": True, "y": {"z": [True]}},
        '[True] at "y/z", where the tree is 1.0',
    ),
}


@pytest.mark.parametrize("name", NO_PREFIX)
def test_a_tree_that_is_no_prefix(name):
    tree, where, came = NO_PREFIX[name]
    with pytest.raises(ValueError, match="where is a path, a list") as caught:
        sg.mask(tree, where)
    message = str(caught.value)
    assert f"got:   {came}" in message
    assert "broadcast_prefix" not in message


# All but a path ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["!mlp_1", "!mlp_0/ww", "!norms", "!x", "!*/ww", "!mlp_*x", "!", "!!norm"]
)
@pytest.mark.parametrize("as_list", [False, True])
def test_the_suggestion_for_all_but_a_path_is_all_but_a_path(wrong, as_list):
    def called(where):
        return sg.mask(PARAMS, [where] if as_list else where)

    with pytest.raises(sg.AddressError, match="which matches nothing") as caught:
        called(wrong)
    found = addresses(str(caught.value))
    assert found
    for at in found:
        assert at.startswith("!")
        left = called(at)
        assert 0 < sum(jax.tree.leaves(left)) < 3 or at == "!n"


def test_a_suggestion_leaves_something():
    for call in (sg.mask, lambda p, at: sg.freeze(optax.sgd(1.0), at).init(p)):
        with pytest.raises(sg.AddressError, match=r'write: "!n"$'):
            call({"n": 3, "f": 1.0}, "!g")
        with pytest.raises(sg.AddressError, match="write: the call without where"):
            call({"f": {"w": 1.0}}, "!g")
    assert sg.mask({"f": {"w": 1.0}}, None) == {"f": {"w": True}}


# What an edit takes -----------------------------------------------------------------


def model(params, x):
    h = sg.name(params["w"] * x, "h")
    return {"loss": jnp.sum(h), "aux": h, "n": params["cfg"]}


@pytest.mark.parametrize("cfg", [3, "mode", (), {}, None], ids=repr)
@pytest.mark.parametrize(
    "wrong", ["Params", "params/cf", "cfg", "params/cfg/x", "return/m", "Params/cfg"]
)
def test_an_edit_is_told_of_nothing_that_it_refuses(wrong, cfg):
    args = {"w": jnp.ones(2), "cfg": cfg}, 2.0

    def edited(at):
        return sg.edit(model, {at: lambda x: x})(*args)

    with pytest.raises(sg.AddressError) as caught:
        edited(wrong)
    found = addresses(str(caught.value))
    assert found
    for at in found:
        edited(at)


def test_an_edit_of_a_tree_of_nothing():
    args = {"w": jnp.ones(2), "cfg": ()}, 2.0
    with pytest.raises(TypeError, match="a tree without leaves"):
        sg.edit(model, {"params/cfg": lambda x: x})(*args)
    args = {"w": jnp.ones(2), "cfg": 3}, 2.0
    with pytest.raises(TypeError, match="a Python value, which is not traced"):
        sg.edit(model, {"params/cfg": lambda x: x})(*args)


# What can be matched ----------------------------------------------------------------

ARGS = {"w": jnp.ones(2), "cfg": 3}, 2.0
KINDS = {
    "gradients": (
        lambda at: sg.gradients(model, at, ys="return/loss")(*ARGS),
        "an argument or a named point of model",
    ),
    "stops": (
        lambda at: sg.gradients(model, 0, ys="return/loss", stop_gradients=at)(*ARGS),
        "an argument or a named point of model",
    ),
    "ys": (
        lambda at: sg.gradients(model, "params", ys=at)(*ARGS),
        "an argument, an output or a named point of model",
    ),
    "nonfinite": (
        lambda at: sg.find_nonfinite(model, at, ys="return/loss")(*ARGS),
        "an argument of model",
    ),
    "edit": (
        lambda at: sg.edit(model, {at: lambda x: x})(*ARGS),
        "an argument, an output or a named point of model",
    ),
    "capture": (
        lambda at: sg.capture(model, at)(*ARGS),
        "an argument, an output or a named point of model",
    ),
}


@pytest.mark.parametrize("verb", KINDS)
def test_only_what_is_taken_is_said_to_match(verb):
    call, kinds = KINDS[verb]
    for wrong in ("return/los", "nothing"):
        with pytest.raises(sg.AddressError) as caught:
            call(wrong)
        assert f"it must match {kinds}\n" in str(caught.value)
        outputs = [at for at in addresses(str(caught.value)) if "return" in str(at)]
        assert not outputs or "an output" in kinds
    if verb != "nonfinite":
        with pytest.raises(sg.AddressError, match="must match a named point of model"):
            call(sg.point("nothing"))


# Nonfinite entries ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zeros", "words"),
    [
        (1, "the only nonfinite entry of"),
        (2, "1 other entry of .* is nonfinite"),
        (3, "2 other entries of .* are nonfinite"),
    ],
)
def test_other_entries_are_counted(zeros, words):
    x = jnp.ones(4).at[:zeros].set(jnp.inf)
    report = str(sg.find_nonfinite(lambda x: jnp.sum(jnp.cos(x)), "x")(x))
    assert re.search(words, report)
