"""Values in code that nobody edited: addressed by the variable they are assigned to."""

import functools

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import models_unedited as models
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from models_unedited import plain
from programs import f32, mesh

import stopgrad_jax as sg

ARGS = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
H = np.tanh(np.array(ARGS[1]) * 0.7)
IMAGE = jax.random.normal(jax.random.key(0), (2, 6, 6, 1), jnp.float32)
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def raises(message, ask, kind=sg.AddressError):
    with pytest.raises(kind, match=BEATS) as caught:
        ask()
    assert message in str(caught.value)


def assert_close(a, b):
    assert jax.tree.leaves(a)  # an unconnected gradient is None, and None fits None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


# -- Grad-CAM on a model nobody edited ---


def assert_grad_cam(fun, address, activation, head):
    """Activation and gradient are those of the model split by hand."""
    y, values = sg.capture(fun, address)(IMAGE)
    assert_close(values[address], activation)
    assert_close(y, head(activation))
    loss = lambda x: jnp.sum(fun(x)[:, 1])
    found = sg.gradients(loss, address)(IMAGE)
    assert_close(found, jax.grad(lambda a: jnp.sum(head(a)[:, 1]))(activation))


@pytest.mark.parametrize("label", ["feat", "__call__.feat", "Net.__call__.feat"])
def test_grad_cam_flax_nnx(label, run):
    net = models.Net(nnx.Rngs(0))
    net.eval()
    head = lambda a: net.head(a.mean(axis=(1, 2)))
    assert_grad_cam(lambda x: net(x), sg.var(label), net.features(IMAGE), head)
    graph, state, rest = nnx.split(net, nnx.Param, ...)
    fun = lambda state, x: nnx.merge(graph, state, rest)(x).sum()
    grads = run(sg.gradients(fun, {"s": "state", "f": sg.var(label)}))(state, IMAGE)
    assert_close(grads["s"], run(jax.grad(fun))(state, IMAGE))
    assert_close(grads["f"], jax.grad(lambda a: head(a).sum())(net.features(IMAGE)))


def test_grad_cam_while_training_in_nnx():
    net = models.Net(nnx.Rngs(0))
    graph, state = nnx.split(net)

    def fun(state, x):
        net = nnx.merge(graph, state)
        y = net(x)
        return y.sum(), nnx.state(net)  # batch statistics and dropout counts

    (_, after), values = sg.capture(fun, [sg.var("feat"), sg.var("pooled")])(
        state, IMAGE
    )
    feat = values[sg.var("feat")]
    assert feat.shape == (2, 6, 6, 6)
    assert np.mean(feat == 0) > 0.5  # after the dropout
    assert_close(values[sg.var("pooled")], feat.mean(axis=(1, 2)))
    without_keys = lambda state: nnx.split_state(state, nnx.RngState, ...)[1]
    assert_close(without_keys(after), without_keys(fun(state, IMAGE)[1]))


def test_grad_cam_flax_linen(run):
    model = models.Linen()
    variables = model.init(jax.random.key(0), IMAGE)

    def fun(variables, x):
        y, state = model.apply(variables, x, mutable=["batch_stats"])
        return y[:, 1].sum(), state

    addresses = [sg.var("feat"), sg.var("normed")]
    _, values = run(sg.capture(fun, addresses))(variables, IMAGE)
    feat, normed = (values[a] for a in addresses)
    feat, normed = np.array(feat), np.array(normed)
    mean, var = feat.mean((0, 1, 2)), feat.var((0, 1, 2))
    np.testing.assert_allclose(
        normed, (feat - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5
    )
    ask = sg.gradients(fun, sg.var("Linen.__call__.normed"), has_aux=True)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert_close(
        ask(variables, IMAGE)[0], np.broadcast_to(kernel[:, 1] / 36, normed.shape)
    )


def test_grad_cam_equinox():
    model = models.Eqx(jax.random.key(0))
    features = jax.vmap(lambda x: jax.nn.relu(model.conv(x.transpose(2, 0, 1))))
    head = jax.vmap(lambda a: model.head(a.mean(axis=(1, 2))))
    fun = jax.vmap(lambda x: model(x.transpose(2, 0, 1)))
    assert_grad_cam(fun, sg.var("feat"), features(IMAGE), head)


def test_grad_cam_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: models.Haiku()(x)))
    params = net.init(jax.random.key(0), IMAGE)
    weights = params["haiku/conv2_d"]
    dims = ("NHWC", "HWIO", "NHWC")
    activation = jax.nn.relu(
        jax.lax.conv_general_dilated(
            IMAGE, weights["w"], (1, 1), "SAME", dimension_numbers=dims
        )
        + weights["b"][None, None, None]
    )
    linear = params["haiku/linear"]
    head = lambda a: a.mean(axis=(1, 2)) @ linear["w"] + linear["b"][None]
    assert_grad_cam(lambda x: net.apply(params, x), sg.var("feat"), activation, head)


# -- everywhere that a name works ---


def nested_jit(w, x):
    @jax.jit
    def inner(x):
        feat = jnp.tanh(w * x)
        return feat * feat

    return jnp.sum(inner(x))


def in_cond(w, x):
    def yes(x):
        feat = jnp.tanh(w * x)
        return feat**2

    return jnp.sum(jax.lax.cond(w > 0, yes, lambda x: x, x))


def in_scan(w, x):
    def step(total, x):
        feat = jnp.tanh(w * x)
        return total + feat**2, None

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), x)[0]


def in_vmap(w, x):
    def one(x):
        feat = jnp.tanh(w * x)
        return feat**2

    return jnp.sum(jax.vmap(one)(x))


def in_remat(w, x):
    @jax.checkpoint
    def body(x):
        feat = jnp.tanh(w * x)
        return feat**2

    return jnp.sum(body(x))


def in_shard_map(w, x):
    def shard(w, x):
        feat = jnp.tanh(w * x)
        return feat**2

    P = PartitionSpec
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jnp.sum(jax.shard_map(shard, mesh=mesh(4), **specs)(w, x))


def operators(w, x):
    scaled = w * x
    feat = jnp.where(True, jnp.tanh(scaled), 0.0) if w.ndim == 0 else scaled
    return (feat * feat).sum()


EVERYWHERE = {
    "plain": plain,
    "decorated": models.decorated,
    "lambda": lambda w, x: plain(w, x),
    "partial": functools.partial(plain),
    "jit": jax.jit(plain),
    "nested jit": nested_jit,
    "cond": in_cond,
    "scan": in_scan,
    "vmap": in_vmap,
    "remat": in_remat,
    "shard_map": in_shard_map,
    "operators": operators,
}
everywhere = pytest.mark.parametrize("fun", EVERYWHERE.values(), ids=EVERYWHERE.keys())
FEAT = sg.var("feat")


@everywhere
def test_everywhere(fun, run):
    out, values = run(sg.capture(fun, FEAT))(*ARGS)
    assert_close((out, values[FEAT]), (np.sum(H**2), H))
    assert_close(run(sg.gradients(fun, FEAT))(*ARGS), 2 * H)
    assert sg.gradients(fun, 0, stop_gradients=FEAT)(*ARGS) is None
    assert_close(sg.gradients(fun, 1, ys=FEAT)(*ARGS), 0.7 * (1 - H**2))
    edited = sg.edit(fun, {FEAT: lambda h: 3 * jax.lax.stop_gradient(h) + h})
    out, dw = run(jax.value_and_grad(edited))(*ARGS)
    assert_close(out, np.sum((4 * H) ** 2))
    assert_close(dw, np.sum(8 * H * (1 - H**2) * np.array(ARGS[1])))
    zero = {FEAT: jnp.zeros(4, jnp.float32)}
    assert_close(jax.grad(run(sg.perturb(fun, FEAT)))(zero, *ARGS)[FEAT], 2 * H)
    assert_close(
        jax.grad(lambda *a: jnp.sum(sg.gradients(fun, FEAT)(*a)))(*ARGS),
        np.sum(2 * (1 - H**2) * np.array(ARGS[1])),
    )


def test_several_executions_are_a_tuple(run):
    def f(x):
        for _ in range(3):
            h = jnp.sin(x)
            x = h * 2.0
        return x

    def g(x):
        for w in (1.0, 2.0, 3.0):
            x = jnp.sin(w * x) + 1.0  # nothing lies between two executions
        return x

    def k(x):
        for layer in (jnp.sin, models.block, jnp.cos):
            x = layer(x)
        for _ in range(2):
            y = models.block(x)
            x = y
        return x

    found = run(sg.gradients(f, sg.var("h")))(f32(1.0)[0])
    assert len(found) == 3
    assert found[2] == 2.0
    values = run(sg.capture(g, sg.var("x")))(f32(1.0)[0])[1][sg.var("x")]
    x, expected = 1.0, []
    for w in (1.0, 2.0, 3.0):
        x = np.sin(w * x) + 1.0
        expected.append(x)
    assert_close(values, tuple(map(np.float32, expected)))
    values = sg.capture(k, sg.var("y"))(1.0)[1][sg.var("y")]
    assert len(values) == 2
    assert_close(values[1], k(1.0))


def test_a_loop_inside_is_not_a_repetition():
    def deep(x):
        for _ in range(3):
            x = jnp.sin(x)
        return x

    def f(x):
        feat = deep(x) * 2.0
        many = sum([jnp.sin(feat * k) for k in (1.0, 2.0, 3.0)])
        same = deep(many)
        return same + 0.0

    x = f32(0.4)[0]
    names = [sg.var(n) for n in ("feat", "many", "same")]
    values = sg.capture(f, names)(x)[1]
    feat = np.sin(np.sin(np.sin(0.4))) * 2
    many = np.sin(feat) + np.sin(2 * feat) + np.sin(3 * feat)
    assert_close([values[n] for n in names[:2]], [np.float32(feat), np.float32(many)])
    assert_close(values[names[2]], f(x))


def test_layers_in_a_loop():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in (3, 4, 5):
                x = nn.Dense(size)(x)
            return x

    layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(k)) for k in range(3)])

    def stack(x):
        for layer in layers:
            x = nnx.relu(layer(x))
        return x

    def attention(x):
        for k in range(2):
            scores = jax.nn.softmax(jnp.einsum("ij,kj->ik", x, x) / 2.0)
            x = scores @ x + k
            pooled = x.mean(axis=0)
        return x.sum() + pooled.sum()

    x = jnp.ones((2, 3), jnp.float32)
    model = Stack()
    params = model.init(jax.random.key(0), x)
    address = sg.var("x")
    values = sg.capture(model.apply, address)(params, x)[1][address]
    assert [v.shape for v in values] == [(2, 3), (2, 4), (2, 5)]
    assert_close(values[2], model.apply(params, x))
    values = sg.capture(stack, address)(x)[1][address]
    expected = [nnx.relu(layers[0](x))]
    expected += [nnx.relu(layers[1](expected[0]))]
    assert_close(values, (*expected, stack(x)))
    names = [sg.var("scores"), sg.var("pooled"), address]
    values = sg.capture(attention, names)(x)[1]
    assert [len(values[n]) for n in names] == [2, 2, 2]
    assert_close(values[names[1]][1], values[address][1].mean(axis=0))


def test_recursion():
    def power(x, n):
        y = power(x, n - 1) * x if n > 1 else x * 1.0
        return y

    values = sg.capture(power, sg.var("y"))(2.0, 3)[1][sg.var("y")]
    assert_close(values, (np.float32(2), np.float32(4), np.float32(8)))


def test_calls_of_one_function_from_a_loop():
    f = lambda x: sum(models.block(x * k) for k in (1.0, 2.0))
    found = sg.gradients(f, sg.var("h"))(1.0)
    assert found == (2.0, 2.0)


def test_code_of_an_installed_library():
    loss = lambda y: optax.huber_loss(y, jnp.zeros_like(y), delta=1.0).sum()
    y = f32(0.5, 3.0)
    address = sg.var("huber_loss.quadratic")
    assert_close(sg.capture(loss, address)(y)[1][address], np.minimum(y, 1.0))
    held = sg.gradients(loss, 0, stop_gradients=[address, sg.var("linear")])
    assert held(y) is None


# -- statements of all kinds ---


def test_tuples():
    def f(x):
        q, k, v = jnp.split(x, 3)
        a, b = jnp.sin(q), jnp.cos(k)
        u, w = v.reshape(2, 1) * 2.0
        carry, ys = jax.lax.scan(lambda c, x: (c + x, c * x), u, w)
        y = a * b + carry
        return y.sum() + ys.sum()

    x = f32(1, 2, 3, 4, 5, 6)
    names = [sg.var(n) for n in ("q", "k", "v", "a", "b", "u", "w", "ys", "carry")]
    values = sg.capture(f, names)(x)[1]
    expected = [
        x[:2],
        x[2:4],
        x[4:],
        np.sin(x[:2]),
        np.cos(x[2:4]),
        f32(10),
        f32(12),
    ]
    for name, value in zip(names, expected, strict=False):
        assert_close(values[name], value)
    assert_close(values[sg.var("carry")], f32(22))


def test_a_tuple_that_a_function_returns():
    w, x = ARGS
    names = [sg.var("mu"), sg.var("sigma")]
    values = sg.capture(models.autoencode, names)(w, x)[1]
    assert_close([values[n] for n in names], [jnp.tanh(w * x), jnp.exp(w + x)])
    found = sg.gradients(models.autoencode, names, stop_gradients=names)(w, x)
    mu, sigma = values[names[0]], values[names[1]]
    assert_close(found, [2 * mu * sigma**2, 2 * mu**2 * sigma])


def test_other_statements():
    class Box:
        def __call__(self, x):
            self.h = jnp.sin(x)
            total: jax.Array = self.h * 2.0
            total += jnp.cos(x)
            return total

    f = lambda x: Box()(x) * 3.0
    x = f32(0.5)[0]
    assert sg.gradients(f, sg.var("self.h"))(x) == 6.0
    assert sg.gradients(f, sg.var("Box.__call__.self.h"))(x) == 6.0
    raises("  got:   2:\n", lambda: sg.gradients(f, sg.var("total"))(x))


def test_augmented_assignment():
    def f(x):
        x += jnp.sin(x)
        return x * 3.0

    x = f32(0.5)[0]
    assert_close(sg.capture(f, sg.var("x"))(x)[1][sg.var("x")], x + jnp.sin(x))
    assert sg.gradients(f, sg.var("x"))(x) == 3.0
    assert sg.edit(f, {sg.var("x"): lambda x: x * 0 + 1})(x) == 3.0


def test_beside_names_and_operations():
    def f(x):
        feat = sg.name(jnp.sin(x), "long_name")
        return feat * 2.0

    x = f32(0.5)[0]
    both = sg.edit(f, {FEAT: lambda h: h + 1, "long_name": lambda h: h * 10})
    assert both(x) in (20 * np.sin(x) + 2, 20 * (np.sin(x) + 1))
    g = lambda x: plain(x, x)
    found = sg.gradients(g, [FEAT, sg.op("tanh"), "x"])(x)
    assert found[0] == found[1]
    doubled = sg.edit(
        g, {sg.op("tanh"): lambda op, x: 2 * op(x), FEAT: lambda h: h + 1}
    )
    assert_close(doubled(x), (2 * np.tanh(x * x) + 1) ** 2)


def test_in_a_part_already_differentiated():
    def f(x):
        def inner(x):
            feat = jnp.sin(x)
            return jnp.exp(feat)

        return jax.grad(inner)(x)

    x = f32(0.5)[0]
    assert_close(sg.capture(f, FEAT)(x)[1][FEAT], np.sin(x))
    ask = lambda: sg.edit(f, {FEAT: abs})(x)
    raises("jax.grad(sg.edit(f, ...))", ask, ValueError)


def test_in_the_body_of_a_rule():
    @jax.custom_jvp
    def rule(x):
        inside = jnp.sin(x)
        return inside * 2

    rule.defjvp(lambda p, t: (rule(*p), t[0]))
    f = lambda x: rule(x) * 2
    address = sg.var("inside")
    assert_close(sg.capture(f, address)(0.5)[1][address], np.float32(np.sin(0.5)))
    raises("the body of one", lambda: sg.gradients(f, address)(0.5), ValueError)
