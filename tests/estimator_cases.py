"""Every estimator as a function of one example, and the contexts that it is put in."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from programs import mesh

from stopgrad_jax.estimators import quantize, sample, score, surrogate

KEY = jax.random.key(7)
CODES = jnp.linspace(-1.5, 1.5, 40).reshape(5, 8)
STEP = jnp.float32(0.3)


def _like(value, x):
    return value.astype(x.dtype)


def _vq(gradient):
    def quantized(x):
        codes = _like(CODES, x)
        return quantize.vector_quantize(x, codes, gradient=gradient).quantized

    return quantized


# Each takes one example, a row of 8 numbers, and returns an array.
ESTIMATORS = {
    "surrogate.spike": lambda x: surrogate.spike(x, surrogate.fast_sigmoid(5.0)),
    "surrogate.sign": lambda x: surrogate.sign(x, surrogate.hard_tanh()),
    "quantize.round": quantize.round,
    "quantize.floor": quantize.floor,
    "quantize.ceil": quantize.ceil,
    "quantize.trunc": quantize.trunc,
    "quantize.clip": lambda x: quantize.clip(x, -0.5, 0.5),
    "quantize.fake_quant": lambda x: quantize.fake_quant(x, -1.0, 1.0, 4),
    "quantize.fake_quant_affine": lambda x: quantize.fake_quant_affine(
        x, 0.25, 0, -4, 3
    ),
    "quantize.lsq": lambda x: quantize.lsq(x, _like(STEP, x), -4, 3, num_elements=8),
    "quantize.fsq": lambda x: quantize.fsq(x, [5, 5, 5, 5, 3, 3, 3, 3]),
    "quantize.lfq": quantize.lfq,
    "quantize.bsq": quantize.bsq,
    "quantize.vector_quantize": _vq("straight_through"),
    "quantize.vector_quantize, rotation": _vq("rotation"),
    "sample.bernoulli": lambda x: sample.bernoulli(KEY, x),
    "sample.categorical": lambda x: sample.categorical(KEY, x),
    "sample.gumbel_softmax": lambda x: sample.gumbel_softmax(KEY, x, 0.7),
    "sample.reinmax": lambda x: sample.reinmax(KEY, x),
    "sample.gumbel_rao": lambda x: sample.gumbel_rao(KEY, x, 0.7, num_samples=3),
    "sample.top_k_mask": lambda x: sample.top_k_mask(x, 3),
    "score.magic_box": score.magic_box,
    "score.score_loss": lambda x: score.score_loss(jnp.cos(x), x),
    "score.leave_one_out": score.leave_one_out,
    "score.dice": lambda x: score.dice(x, jnp.cos(x), discount=0.9)[None],
}
X = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 8)), jnp.float32)


def looped(f, x):
    return jnp.stack([f(row) for row in x])


def _sharded(f, x):
    rows = lambda x: jax.vmap(f)(x)
    return jax.shard_map(rows, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))(x)


CONTEXTS = {
    "jit": lambda f, x: jax.jit(lambda x: looped(f, x))(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "scan": lambda f, x: jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1],
    "checkpoint": lambda f, x: looped(jax.checkpoint(f), x),
    "cond": lambda f, x: looped(
        lambda row: jax.lax.cond(row[0] < 99, f, lambda row: 0 * f(row), row), x
    ),
    "shard_map": _sharded,
}


def has_forward(f):
    try:
        jax.eval_shape(lambda x: jax.jvp(f, (x,), (x,))[1], X[0])
    except TypeError:
        return False
    return True
