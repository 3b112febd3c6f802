"""`sg.op(..., within=...)`: paths of named scopes, functions, and wildcards in both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

X = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 3 - 1
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def refusal(ask):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        ask()
    return str(caught.value)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(3)(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def net():
    model = Net()
    return model.apply, model.init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("within", "count"),
    [
        ("Block_0", 1),
        ("Block_*", 2),
        ("Net", 3),
        ("Net/Block_1", 1),
        ("Net/*/Dense_0", 2),
        ("**/Dense_0", 3),
        ("Dense_0", 3),
        ("Net/Dense_0", 1),
        ("Block_1/Dense_0", 1),
        ("Net/**", 3),
        ("Block", 2),
        ("Bl*k", 2),
    ],
)
def test_within_a_path_of_scopes(net, within, count):
    apply, params = net
    address = sg.op("Dense", within=within)
    found = sg.capture(apply, address)(params, X)[1][address]
    assert len(found if count > 1 else [found]) == count


def test_a_module_is_an_operation(net):
    apply, params = net
    address = sg.op("Dense", within="Block_*", nth=-1)
    kernel = lambda block: params["params"][block]["Dense_0"]["kernel"]
    bias = lambda block: params["params"][block]["Dense_0"]["bias"]
    x = jnp.sin(X @ kernel("Block_0") + bias("Block_0")[None])
    found = sg.capture(apply, address)(params, X)[1][address]
    assert_close(found, x @ kernel("Block_1") + bias("Block_1")[None])
    zero = sg.edit(apply, {address: lambda dense, *xs: 0.0 * dense(*xs)})
    last = params["params"]["Dense_0"]
    expected = jnp.sin(0 * X) @ last["kernel"] + last["bias"][None]
    assert_close(zero(params, X), expected)


def test_within_a_nested_program():
    def fun(x):
        with jax.named_scope("a"):
            step = jax.named_scope("b")(lambda c, _: (jnp.sin(c), None))
            y = jax.lax.scan(step, x, None, length=2)[0]
        return y + jnp.sin(x)

    for within, shape in (("a/b", (2, 2, 3)), ("b", (2, 2, 3)), ("a", (2, 2, 3))):
        address = sg.op("sin", within=within)
        assert sg.capture(fun, address)(X)[1][address].shape == shape


@pytest.mark.parametrize(
    ("within", "message"),
    [
        ("Blok_1", 'write: one of sg.op("sin", within="Block_1")'),
        ("Net/Dense_0", 'there are matches in "Net/Block_0", "Net/Block_1"'),
        ("Blocks_*", 'sg.op("sin", within="Block_'),
    ],
)
def test_a_scope_that_there_is_not(net, within, message):
    apply, params = net
    said = refusal(lambda: sg.capture(apply, sg.op("sin", within=within))(params, X))
    assert f'none within "{within}": there are matches in "Net/Block_0"' in said
    assert message in said


def test_modules_by_the_names_that_users_know():
    """`nn.Conv` is a class of its own in flax, whose calls are those of `_Conv`."""
    conv, image = nn.Conv(2, (3, 3)), jnp.ones((1, 4, 4, 1), jnp.float32)
    params = conv.init(jax.random.key(0), image)
    fun = lambda params, x: jnp.sum(conv.apply(params, jnp.sin(x)) ** 2)
    for name in ("Conv", "_Conv", "_Conv.__call__"):
        address = sg.op(name)
        found = sg.capture(fun, address)(params, image)[1][address]
        assert_close(found, conv.apply(params, jnp.sin(image)))
