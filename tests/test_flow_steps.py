"""Whole training steps of a language model: gradient, optax update and state inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

WORDS, TIME, WIDTH, HEADS, LAYERS = 7, 4, 4, 2, 2


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, "float32")


PARAMS = {
    "embedding": random((WORDS, WIDTH), 0),
    "blocks": {
        "qkv": random((LAYERS, WIDTH, 3 * WIDTH), 1),
        "up": random((LAYERS, WIDTH, 6), 2),
        "down": random((LAYERS, 6, WIDTH), 3),
        "scale": random((LAYERS, WIDTH), 4),
    },
}
BATCH = jnp.asarray(np.random.default_rng(5).integers(0, WORDS, (2, TIME + 1)))


@jax.custom_vjp
def cross_entropy(logits, labels):
    chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def cross_entropy_bwd(residuals, ct):
    logits, labels = residuals
    wrong = jax.nn.softmax(logits) - jax.nn.one_hot(labels, WORDS)
    return ct * wrong / labels.size, np.zeros(labels.shape, jax.dtypes.float0)


cross_entropy.defvjp(
    lambda logits, labels: (cross_entropy(logits, labels), (logits, labels)),
    cross_entropy_bwd,
)


def rotated(x):
    """Rotary positions, with complex numbers."""
    turn = jnp.exp(1j * jnp.arange(x.shape[1])).astype("complex64")[:, None, None]
    z = jax.lax.complex(x[..., ::2], x[..., 1::2]) * turn
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


def gpt(params, ids):
    @jax.checkpoint
    def block(x, p):
        h = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["scale"]
        qkv = (h @ p["qkv"]).reshape(*x.shape[:2], HEADS, -1)
        q, k, v = jnp.split(qkv, 3, -1)
        mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + mixed.reshape(x.shape)
        return x + jax.nn.silu(x @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(block, params["embedding"][ids], params["blocks"])
    return x @ params["embedding"].T


def loss_fn(params, batch):
    return cross_entropy(gpt(params, batch[:, :-1]), batch[:, 1:])


SCHEDULE = optax.warmup_cosine_decay_schedule(0.1, 1.0, 2, 10)
ADAMW = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(SCHEDULE, eps=1e-2))
LINE_SEARCH = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3))


def step(state, batch, tx=ADAMW, mean=lambda grads: grads):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    value_fn = functools.partial(loss_fn, batch=batch)
    more = {"value": loss, "grad": mean(grads), "value_fn": value_fn}
    updates, opt_state = optax.with_extra_args_support(tx).update(
        more["grad"], opt_state, params, **more
    )
    return (optax.apply_updates(params, updates), opt_state), loss


def scanned(state, batch):
    return jax.lax.scan(step, state, jnp.stack([batch] * 2))


def mapped(state, batch):
    mean = functools.partial(jax.lax.pmean, axis_name="d")
    many = jax.pmap(functools.partial(step, mean=mean), axis_name="d")
    first = jax.tree.map(lambda x: jnp.asarray(x)[None], (state, batch))
    return jax.tree.map(lambda x: x[0], many(*first))


WAYS = {
    "as it is": step,
    "jit": jax.jit(step),
    "scan": jax.jit(scanned),
    "pmap": mapped,
}


def started():
    """A state in the middle of training."""
    clip, (adam, *rest) = ADAMW.init(PARAMS)
    squares = jax.tree.map(lambda x: 0.1 + x**2, PARAMS)
    adam = adam._replace(count=adam.count + 2, mu=PARAMS, nu=squares)
    return PARAMS, (clip, (adam, *rest))


@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_by_its_new_state(way):
    """Where `jax.grad` is not zero it flows; nothing is unknown."""
    state = started()
    flow = sg.flow(WAYS[way], ys="return/0")(state, BATCH)

    def probe(leaves):
        new, _ = WAYS[way](jax.tree.unflatten(tree_of, leaves), BATCH)
        floats = [x for x in jax.tree.leaves(new) if x.dtype == jnp.float32]
        return sum(jnp.sum(jnp.sin(3 * x)) for x in floats)

    tree_of = jax.tree.structure(state)
    grads = jax.grad(probe, allow_int=True)(jax.tree.leaves(state))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, x), grad in zip(paths, grads, strict=True):
        at = "state/" + jax.tree_util.keystr(path, simple=True, separator="/")
        (row,) = [r for r in flow.inputs if f"{at}/".startswith(f"{r.path}/")]
        if x.dtype == jnp.float32:
            assert (row.status == "flows") == bool(np.any(grad)), at
            assert row.status in ("flows", "cut", "unused"), at
        else:
            assert row.status == "data"
    assert flow.connected("state/0") is True


RAISED = "Reverse-mode differentiation does not work"


def raises(fun, x, *args):
    """Whether `jax.grad` raises as it does at a loop without a reverse mode."""
    try:
        jax.eval_shape(lambda x: jax.grad(fun)(x, *args), x)
    except ValueError as error:
        if RAISED not in str(error):
            raise
        return True
    return False


def test_a_line_search_is_unknown_only_where_it_raises():
    """Its rate comes out of a `while`, in which other values move."""
    calls = []

    def searched(state, batch):
        calls.append(1)
        return step(state, batch, LINE_SEARCH)

    params, (first, search) = PARAMS, LINE_SEARCH.init(PARAMS)

    def new_embedding(params, rate):
        state = params, (first, search._replace(learning_rate=rate))
        return jnp.sum(searched(state, BATCH)[0][0]["embedding"])

    rate = search.learning_rate
    assert not raises(lambda p: new_embedding(p, rate), params)
    assert raises(lambda r: new_embedding(params, r), rate)
    state = params, (first, search)
    flow = sg.flow(searched, ys="return/0/0/embedding")(state, BATCH)
    rows = {row.path: row.status for row in flow.inputs}
    assert rows["state/0"] == "flows"
    assert rows["state/1/1/learning_rate"] == "unknown"
    # By all of the state JAX raises; to try it for each leaf would take long.
    del calls[:]
    flow = sg.flow(searched, ys="return/0")(state, BATCH)
    rows = {row.path: row for row in flow.inputs}
    assert rows["state/0"].status == "unknown"
    assert rows["state/0"].terms["return/0/0/embedding"] == "flows"
    assert len(calls) <= 4
    text = str(flow.explain("state/0"))
    assert f"jax.grad raises at while_loop (tests/test_flow_steps.py:{LINE})" in text
    assert RAISED in text


LINE = step.__code__.co_firstlineno + 5

WITHIN = {
    "alone": lambda loop: loop,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda loop: lambda x: jax.lax.cond(x[0] > -9, loop, lambda x: x, x),
    "scan": lambda loop: (
        lambda x: jax.lax.scan(lambda x, _: (loop(x), None), x, None, length=2)[0]
    ),
    "vmap": lambda loop: (
        lambda x: tuple(v[0] for v in jax.vmap(loop)(tuple(v[None] for v in x)))
    ),
    "while": lambda loop: (
        lambda x: jax.lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, loop(c[1])), (0, x)
        )[1]
    ),
}


def by_one(value, fun, x, k, out):
    return fun((*x[:k], value, *x[k + 1 :]))[out]


@pytest.mark.parametrize("within", WITHIN)
def test_only_what_moves_in_a_loop_and_comes_back_raises(within):
    """Four values are carried, each computed from some of them: `jax.grad` knows."""
    rng, found = np.random.default_rng(0), set()
    for _ in range(5):
        reads = rng.random((4, 4)) < 0.35

        def body(x, reads=reads):
            return tuple(
                jnp.sin(sum((x[k] for k in range(4) if row[k]), 0.5)) for row in reads
            )

        def loop(x, body=body):
            step = lambda c: (c[0] + 1, body(c[1]))
            return jax.lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

        fun = WITHIN[within](loop)
        x = tuple(map(jnp.float32, (0.1, 0.2, 0.3, 0.4)))
        for out in range(4):
            flow = sg.flow(fun, ys=f"return/{out}")(x)
            rows = {row.path: row.status for row in flow.inputs}
            for k in range(4):
                (word,) = [w for p, w in rows.items() if f"x/{k}/".startswith(f"{p}/")]
                raised = raises(by_one, x[k], fun, x, k, out)
                assert (word == "unknown") == raised, (reads, out, k)
                found.add(word)
    assert {"unknown", "unused"} <= found
