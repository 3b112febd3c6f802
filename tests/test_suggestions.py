"""Every address that an error says to write works when it is pasted."""

import ast
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import models_unedited as models
import numpy as np
import pytest
import remedies
from programs import f32

import stopgrad_jax as sg

X = f32(0.5, 1.0, -0.5)
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def model(params, batch, temperature=2.0):
    hidden = jnp.tanh(params["w"] * batch["x"])
    point = sg.name(hidden * 2.0, "code")
    h = jax.nn.relu(point)
    h = jax.nn.softmax(h)
    alias = h
    for k in range(2):
        round_of = alias * k
    return {"loss": jnp.sum(round_of) / temperature, "n": 3}


ARGS = ({"w": X, "b": {"deep": X, "n": 2}}, {"x": X, "0": X})


def test_suggestions_are_tried_where_they_are_printed():
    before = dict(remedies.tried)
    with pytest.raises(sg.AddressError):
        sg.gradients(model, "params/v")(*ARGS)
    with pytest.raises(sg.AddressError):
        sg.stop_gradient(ARGS[0], "v")
    assert all(remedies.tried[kind] > count for kind, count in before.items())

    def refuse(subject, wanted, called):
        raise sg.AddressError('f(x): "v"\n  got:   none\n  write: one of "w"')

    with pytest.raises(remedies.Unworkable, match="'w'"):
        remedies.trying(refuse, "where", lambda path: path)({}, "v", "f(x)")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3)(x)
        y = nn.gelu(y)
        return y


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(1)(x)


@functools.cache
def net():
    return Net().apply, (Net().init(jax.random.key(0), X), X)


def of_model(address):
    return model, ARGS, address


def of_net(address):
    return (*net(), address)


@functools.cache
def attention():
    layer, x = nn.MultiHeadDotProductAttention(2), jnp.ones((1, 2, 4), jnp.float32)
    fun = lambda params, x: layer.apply(params, x * 2.0, x)
    return fun, (layer.init(jax.random.key(0), x, x), x)


def of_attention(address):
    return (*attention(), address)


def of_both(address):
    return lambda x: models.both(x) + models.block(x * 2), (X,), address


CASES = [
    *map(
        of_model,
        [
            "hidden",
            "hiddn",
            "h",
            "alias",
            "round_of",
            "params/w/0",
            "params/w/0/kernel",
            "0/w/1",
            "batch/x/0",
            "1/0/3",
            "params/b/deep/k",
            "params/b/n/k",
            "code/0",
            "return/loss/0",
            "params/v",
            "prams",
            "deep",
            "w",
            7,
            "7/w",
            "cod",
            "softmax",
            "tanh",
            "params/**/bias",
            sg.point("cod"),
            sg.point("params"),
            sg.var("h"),
            sg.var("model.h"),
            sg.var("hid"),
            sg.var("models.hidden"),
            sg.var("hidden", nth=3),
            sg.var("hidden", line=1),
            sg.var("h", nth=5),
            sg.var("alias"),
            sg.var("params"),
            sg.var("nothing"),
            sg.op("gelu"),
            sg.op("sofmax"),
            sg.op("tan"),
            sg.op("relu", within="Dense"),
            sg.op("tanh", nth=4),
        ],
    ),
    *map(
        of_net,
        [
            "Dense_0",
            "Block_1",
            "Block_1/Dense_0",
            "Net",
            "Dense",
            "kernel",
            "params/Block_0/Dense_0/kernel",
            "variables/params/Dense_0/kernel/0",
            "y",
            "gelu",
            sg.var("y"),
            sg.var("Block.y"),
            sg.op("gelu", within="Blok_1"),
            sg.op("Dense", within="Block_7"),
            sg.op(("Dens", "gelu_")),
            sg.op("silu"),
            sg.op("take"),
        ],
    ),
    *map(
        of_attention,
        [
            "attn_weights",
            sg.var("attn_weights"),
            sg.var("inputs_q"),
            sg.var("out"),
            sg.op("attention"),
            sg.op("DenseGeneral", within="quer"),
        ],
    ),
    *map(of_both, ["h", sg.var("h"), sg.var("x"), sg.var("both.h"), sg.var("bloc.h")]),
]


def addresses(message):
    """Every address in the last beat of an error, as a reader would copy it."""
    last = message.partition("\n  write: ")[2]
    calls = re.findall(
        r"sg\.(?:op|var|point)\((?:\([^)]*\)|slice\([^)]*\)|[^()])*\)", last
    )
    rest = functools.reduce(lambda text, call: text.replace(call, ""), calls, last)
    return [*map(eval, calls), *re.findall(r'"([^"]*)"', rest)]


def works(fun, args, address):
    if isinstance(address, str) and address.split("/")[0] == "return":
        sg.gradients(fun, 0, ys=address)(*args)
    else:
        sg.capture(fun, address)(*args)


@pytest.mark.parametrize(
    ("fun", "args", "address"), CASES, ids=[str(case[2]) for case in CASES]
)
def test_what_an_error_says_to_write(fun, args, address):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        sg.capture(fun, address)(*args)
    message = str(caught.value)
    assert all(len(line) <= 200 for line in message.splitlines())
    said = addresses(message)
    assert said or "sg.name" in message or "another" in message
    for one in said:
        works(fun, args, one)


@pytest.mark.parametrize(
    ("case", "write"),
    [
        (of_model("hidden"), 'sg.var("hidden")'),
        (of_model("hiddn"), 'one of sg.var("hidden"), sg.var("model.hidden")'),
        (of_model("h"), 'one of sg.var("h", line='),
        (of_model("params/w/0"), '"params/w"'),
        (of_model("0/w/1"), '"params/w"'),
        (of_model("code/0"), '"code"'),
        (of_model("softmax"), 'sg.op("softmax")'),
        (of_model("deep"), 'one of "params/b/deep"'),
        (of_model(sg.op("sofmax")), 'one of sg.op("softmax")'),
        (of_model(sg.var("params")), '"params"'),
        (of_net("Dense_0"), 'one of sg.op("Dense", within="Dense_0"), "variables/'),
        (of_net("Block_1"), 'one of sg.op("Block", within="Block_1"), "variables/'),
        (
            of_attention(sg.var("inputs_q")),
            'sg.var("MultiHeadDotProductAttention.__call__.inputs_q")',
        ),
        (
            of_net(sg.op("gelu", within="Blok_1")),
            'one of sg.op("gelu", within="Block_1")',
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_first_thing_to_write(case, write):
    fun, args, address = case
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(fun, address)(*args)
    assert f"\n  write: {write}" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "came"),
    [
        ("params/w/0", '"params/w" is one array, f32[3]: nothing below it'),
        ("params/b/n/k", '"params/b/n" is a Python value, 2, which is not traced'),
        ("code/0", '"code" is a point of one array'),
        ("hidden", 'no point: "hidden" is a variable of the source'),
        ("temperature", '"temperature" is a parameter of model that was not passed'),
        (sg.op("gelu"), 'functions "model"'),
    ],
)
def test_what_came(address, came):
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(model, address)(*ARGS)
    assert f"\n  got:   {came}" in str(caught.value)


def test_variables_of_a_library_in_several_functions():
    fun, args, address = of_attention(sg.var("attn_weights"))
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(fun, address)(*args)
    assert '\n         sg.var("dot_product_attention.attn_weights")' in str(
        caught.value
    )
    found = sg.capture(fun, sg.var("dot_product_attention.attn_weights"))(*args)[1]
    (weights,) = found.values()
    assert weights.shape == (1, 2, 2, 2)
    assert jnp.allclose(weights.sum(-1), 1.0)


def test_positions_are_said_only_where_there_is_no_name():
    for address in ("prams", "0/v", 9, "1/y"):
        with pytest.raises(sg.AddressError) as caught:
            sg.capture(model, address)(*ARGS)
        assert not re.search(r'"\d', str(caught.value).partition("write:")[2])
    unnamed = jax.jit(jnp.add)
    unnamed = lambda *args, _fun=unnamed: _fun(*args)
    with pytest.raises(sg.AddressError, match='write: one of "args"'):
        sg.capture(unnamed, "x")(X, X)


def test_what_was_not_passed():
    with pytest.raises(sg.AddressError) as caught:
        sg.gradients(model, "temperature", ys="return/loss")(*ARGS)
    write = "temperature=2.0 in the call: what is passed can be addressed"
    assert f"\n  write: {write}" in str(caught.value)
    found = sg.gradients(model, "temperature", ys="return/loss")(*ARGS, temperature=2.0)
    assert found.shape == ()

    unwritable = [jnp.array([1.1, 2.0]), np.arange(3.0), float("nan"), object()]
    for default in (*unwritable, (1.0,) * 50, [jnp.ones(2)], jnp.float32(1.1)):
        fun = lambda x, w=default: jnp.sum(x)
        with pytest.raises(sg.AddressError) as caught:
            sg.gradients(fun, "w")(X)
        write = "pass w in the call: what is passed can be addressed"
        assert str(caught.value).endswith(f"\n  write: {write}")
    for default in (1.5, -2, (0.5, 1.0), "mean"):
        fun = lambda x, w=default: jnp.sum(x)
        with pytest.raises(sg.AddressError) as caught:
            sg.gradients(fun, "w")(X)
        passed = re.search(r"write: w=(.*) in the call", str(caught.value))
        assert ast.literal_eval(passed[1]) == default

    half = functools.partial(model, ARGS[0])
    with pytest.raises(sg.AddressError, match="partial has filled"):
        sg.gradients(half, "params", ys="return/loss")(ARGS[1])
    by_name = functools.partial(model, temperature=3.0)
    with pytest.raises(sg.AddressError, match=r"write: temperature=3\.0 in the call"):
        sg.gradients(by_name, "temperature", ys="return/loss")(*ARGS)
    found = sg.gradients(by_name, "temperature", ys="return/loss")(
        *ARGS, temperature=3.0
    )
    assert found.shape == ()


def test_a_long_list_is_folded():
    wide = lambda p: sum(p.values())
    args = ({f"a_rather_long_name_of_a_parameter_{k}": X for k in range(30)},)
    with pytest.raises(sg.AddressError) as caught:
        sg.gradients(wide, sg.point("q"))(*args)
    assert max(map(len, str(caught.value).splitlines())) <= 200
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(wide, "a_rather_long_name_of_a_parameter_31")(*args)
    assert max(map(len, str(caught.value).splitlines())) <= 200
    assert len(str(caught.value)) < 900
    many = {sg.op(f"a_rather_long_name_{k}"): abs for k in range(30)}
    with pytest.raises(sg.AddressError) as caught:
        sg.edit(wide, many)(*args)
    assert len(str(caught.value)) < 900
