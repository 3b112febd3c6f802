"""Layers and training steps: flax, haiku, e3nn-jax, jraph."""

import warnings

import jax
import jax.numpy as jnp
import optax
from peers.zoo.program import Program, untapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import e3nn_jax as e3nn
    import flax.linen as nn
    import haiku as hk
    import jraph
    from flax import nnx
    from flax.training.train_state import TrainState

import stopgrad_jax as sg


def small(rng, *shape):
    return rng.normal(size=shape).astype("float32") / 2


def like(rng, tree):
    return jax.tree.map(lambda x: small(rng, *x.shape), tree)


# flax: attention

SHIFT = "what is added to every key cancels in the softmax"
TOKENS = jnp.zeros((2, 3, 4))
mask = nn.make_causal_mask(jnp.zeros((2, 3)))


def attend(tap):
    """Flax's own attention, for whoever wants to see its weights."""

    def attention(query, key, value, mask=None):
        weights = nn.dot_product_attention_weights(query, key, mask=mask)
        return jnp.einsum("...hqk,...khd->...qhd", tap(weights, "inner"), value)

    return {} if tap is untapped else {"attention_fn": attention}


def linen_loss(params, x, tap=untapped):
    model = nn.MultiHeadDotProductAttention(num_heads=2, **attend(tap))
    return jnp.mean(model.apply({"params": params}, x, x, mask=mask) ** 2)


def linen(rng):
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, TOKENS)
    return like(rng, shapes["params"]), small(rng, 2, 3, 4)


heads = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
structure, state = nnx.split(heads)


def nnx_loss(params, x, tap=untapped):
    model = nnx.merge(structure, params)
    mixed = model(x, mask=mask)
    return jnp.mean(tap(mixed, "inner") ** 2)


def attention_of_nnx(rng):
    return like(rng, state), small(rng, 2, 3, 4)


# flax: a training step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(h))


def train_step(state, x, y, key):
    def loss_fn(params):
        out = state.apply_fn({"params": params}, x, rngs={"dropout": key})
        return jnp.mean((out - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    grads = jax.lax.pmean(grads, "batch")
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, "batch")


p_step = jax.pmap(train_step, axis_name="batch", devices=jax.devices()[:2])


def step_loss(params, x, y, keys, tap=untapped):
    """How good the parameters are after one step of every device."""
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=optax.sgd(0.5))
    state = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), state)
    state, loss = p_step(state, x, y, keys)
    new = jax.tree.map(lambda x: x[0], state.params)
    kernel = jnp.tanh(x[0] @ new["Dense_0"]["kernel"] + new["Dense_0"]["bias"])
    after = kernel @ new["Dense_1"]["kernel"] + new["Dense_1"]["bias"]
    return jnp.mean((tap(after, "inner") - y[0]) ** 2) + loss[0]


def stepped(rng):
    shapes = jax.eval_shape(
        Net().init,
        {"params": jax.random.key(0), "dropout": jax.random.key(0)},
        jnp.zeros((1, 3)),
    )
    return (
        like(rng, shapes["params"]),
        small(rng, 2, 4, 3),
        small(rng, 2, 4, 1),
        jax.random.split(jax.random.key(0)),
    )


FLAX = {
    "linen": Program(
        "flax",
        "linen.MultiHeadDotProductAttention",
        linen_loss,
        linen,
        sg.var("dot_product_attention.attn_weights"),
        zero={"params/key/bias": SHIFT},
    ),
    "nnx": Program(
        "flax",
        "nnx.MultiHeadAttention",
        nnx_loss,
        attention_of_nnx,
        sg.var("mixed"),
        zero={"params/key/bias/value": SHIFT},
    ),
    "pmap": Program(
        "flax",
        "training.train_state.TrainState, pmapped",
        step_loss,
        stepped,
        sg.var("after"),
    ),
}


# haiku


def quantized(x, tap):
    z = hk.Linear(2)(x)
    quantizer = hk.nets.VectorQuantizer(2, 4, commitment_cost=0.25)
    codes = quantizer(tap(z, "inner"), is_training=True)
    vq_loss = codes["loss"]
    recon = jnp.mean((hk.Linear(3)(codes["quantize"]) - x) ** 2)
    return tap(recon, "recon") + tap(vq_loss, "vq_loss")


vq = hk.without_apply_rng(hk.transform(quantized))


def vq_loss(params, x, tap=untapped):
    return vq.apply(params, x, tap)


def vq_args(rng):
    shapes = jax.eval_shape(
        lambda: vq.init(jax.random.key(0), jnp.zeros((4, 3)), untapped)
    )
    return like(rng, shapes), small(rng, 4, 3)


def averaged(x, tap):
    z = hk.Linear(2)(x)
    quantizer = hk.nets.VectorQuantizerEMA(2, 4, commitment_cost=0.25, decay=0.9)
    codes = quantizer(tap(z, "inner"), is_training=True)
    commit = codes["loss"]
    recon = jnp.mean((hk.Linear(3)(codes["quantize"]) - x) ** 2)
    return tap(recon, "recon") + tap(commit, "commit")


ema = hk.without_apply_rng(hk.transform_with_state(averaged))


def ema_loss(params, state, x, tap=untapped):
    return ema.apply(params, state, x, tap)[0]


def ema_args(rng):
    init = lambda: ema.init(jax.random.key(0), jnp.zeros((4, 3)), untapped)
    params, state = jax.eval_shape(init)
    state = jax.tree.map(lambda x: jnp.asarray(small(rng, *x.shape), x.dtype), state)
    return like(rng, params), state, small(rng, 4, 3)


HAIKU = {
    "VectorQuantizer": Program(
        "dm-haiku",
        "nets.VectorQuantizer",
        vq_loss,
        vq_args,
        sg.var("quantized.z"),
        terms=("recon", "vq_loss"),
    ),
    "VectorQuantizerEMA": Program(
        "dm-haiku",
        "nets.VectorQuantizerEMA",
        ema_loss,
        ema_args,
        sg.var("averaged.z"),
        cut=("state/vector_quantizer_ema/embeddings",),
        unused=tuple(
            f"state/vector_quantizer_ema/~/{ema}/{leaf}"
            for ema in ("ema_cluster_size", "ema_dw")
            for leaf in ("average", "hidden")
        ),
        terms=("recon", "commit"),
    ),
}


# e3nn-jax


def forces(weights, positions):
    def energy(positions):
        edges = positions[None] - positions[:, None] + 0.1
        harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", edges.reshape(-1, 3), True)
        features = e3nn.IrrepsArray("4x0e + 2x1o", jnp.ones((9, 10)))
        product = e3nn.tensor_product(features, harmonics, filter_ir_out=("0e", "1o"))
        linear = e3nn.FunctionalLinear(product.irreps, "2x0e")
        mixed = jax.vmap(linear, (None, 0))(weights, product).array
        return jnp.sum(jnp.tanh(mixed))

    return jax.grad(energy)(positions)


def e3nn_loss(weights, positions, targets, tap=untapped):
    force = -forces(weights, positions)
    return jnp.mean((tap(force, "inner") - targets) ** 2)


def e3nn_args(rng):
    harmonics = e3nn.Irreps("0e + 1o + 2e")
    product = e3nn.tensor_product("4x0e + 2x1o", harmonics, filter_ir_out=("0e", "1o"))
    linear = e3nn.FunctionalLinear(product, "2x0e")
    weights = [small(rng, *i.path_shape) for i in linear.instructions]
    return weights, small(rng, 3, 3), small(rng, 3, 3)


E3NN = {
    "forces": Program(
        "e3nn-jax",
        "spherical_harmonics, tensor_product, FunctionalLinear",
        e3nn_loss,
        e3nn_args,
        sg.var("force"),
    ),
}


# jraph


def graph_loss(params, nodes, edges, targets, tap=untapped):
    graph = jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        senders=jnp.array([0, 1, 2]),
        receivers=jnp.array([1, 2, 0]),
        n_node=jnp.array([3]),
        n_edge=jnp.array([3]),
        globals=jnp.zeros((1, 1)),
    )
    update = lambda w: lambda *xs: jnp.tanh(jnp.concatenate(xs, -1) @ w)
    network = jraph.GraphNetwork(
        jraph.concatenated_args(update(params["edge"])),
        jraph.concatenated_args(update(params["node"])),
        jraph.concatenated_args(update(params["global"])),
    )
    out = network(graph)
    summary = 1.0 * out.globals
    return jnp.mean((tap(summary, "inner") - targets) ** 2)


def graph(rng):
    params = {
        "edge": small(rng, 7, 2),
        "node": small(rng, 7, 2),
        "global": small(rng, 5, 2),
    }
    return params, small(rng, 3, 2), small(rng, 3, 2), small(rng, 1, 2)


JRAPH = {
    "GraphNetwork": Program(
        "jraph", "GraphNetwork", graph_loss, graph, sg.var("summary")
    ),
}
