"""(h) Estimators, forward and backward, against hand-written JAX and the libraries.

Same numbers and sizes, in one process. JAX is compiled, torch is eager, as its users
run it, and TensorFlow is in a `tf.function`. A library that is not installed has no
rows: torch has an environment of its own, where this file is run by itself. It then
prints its rows, and all sides have one core: with two threads, torch's wait for each
other so long on a busy machine that nothing else would be measured.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measure import repeated, side_by_side

import stopgrad_jax as sg

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts

STEPS, BATCH, NEURONS = 100, 32, 256
CODES, WIDTH, VECTORS = 512, 64, 4096
RNG = np.random.default_rng(0)


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


def compiled(fun, *args):
    """Return a call of the function's value and gradients, weighted by a cotangent."""
    ct = jnp.asarray(normal(*jax.eval_shape(fun, *args).shape))
    loss = lambda *args: jnp.sum(fun(*args) * ct)
    step = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))
    args = [jnp.asarray(a) for a in args]
    return lambda: step(*args)


# By hand -----------------------------------------------------------------------------


@jax.custom_jvp
def fired(x):
    return jnp.where(x > 0, 1.0, 0.0)


@fired.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return fired(x), t / (25 * jnp.abs(x) + 1) ** 2


def fake_by_hand(x, low, high):
    """Write TensorFlow's with stop_gradient and where, as is commonly done."""
    step = (high - low) / 255
    zero = jnp.clip(jnp.round(-low / step), 0, 255)
    start, end = -zero * step, (255 - zero) * step
    clipped = jnp.clip(x, start, end)
    value = jnp.floor((clipped - start) / step + 0.5) * step + start
    source = jnp.where(x < start, low, jnp.where(x > end, high, x))
    return source + lax.stop_gradient(value - source)


def quantize_by_hand(z, codebook):
    squares = jnp.sum(codebook**2, -1) - 2 * z @ codebook.T
    code = codebook[jnp.argmin(squares, -1)]
    return z + lax.stop_gradient(code - z)


def gumbel_by_hand(key, x):
    z = x + jax.random.gumbel(key, x.shape)
    soft = jax.nn.softmax(z)
    hot = jax.nn.one_hot(jnp.argmax(z, -1), x.shape[-1])
    return soft + lax.stop_gradient(hot - soft)


def reinmax_by_hand(key, x):
    """Write the authors' rule as a custom_vjp."""

    @jax.custom_vjp
    def sample(x):
        return forward(x)[0]

    def forward(x):
        hot = jax.nn.one_hot(jax.random.categorical(key, x), x.shape[-1])
        return hot, (hot, jax.nn.softmax(x))

    def backward(kept, ct):
        hot, p = kept
        middle = (p + hot) / 2
        pull = lambda p: p * (ct - jnp.sum(p * ct, -1, keepdims=True))
        return (2 * pull(middle) - pull(p) / 2,)

    sample.defvjp(forward, backward)
    return sample(x)


def network(fire):
    """Return two layers of leaky neurons over `STEPS` steps, their spikes summed."""

    def neuron(potential, current):
        reset = lax.stop_gradient(jnp.where(potential > 1, 1.0, 0.0))
        potential = 0.9 * potential + current - reset
        return potential, fire(potential - 1)

    def run(w, v, x):
        def step(carry, x):
            first, spikes = neuron(carry[0], x @ w)
            second, out = neuron(carry[1], spikes @ v)
            return (first, second, carry[2] + out), None

        start = (jnp.zeros((BATCH, w.shape[1])), *[jnp.zeros((BATCH, v.shape[1]))] * 2)
        return lax.scan(step, start, x)[0][2]

    return run


# The sizes, and ours -----------------------------------------------------------------

SPIKES = np.float32(RNG.random((STEPS, BATCH, NEURONS)) < 0.2)
WEIGHTS = normal(NEURONS, NEURONS) * 0.1, normal(NEURONS, 10) * 0.1
MANY, RANGE = normal(1_000_000) * 3, (np.float32(-6.0), np.float32(6.0))
VECTOR, CODEBOOK = normal(VECTORS, WIDTH), normal(CODES, WIDTH)
LOGITS = normal(10_000, 100)
KEY = jax.random.key(0)


def spiking(fire):
    """Leave out the gradient of the input spikes."""
    run = network(fire)
    return compiled(lambda w, v: run(w, v, SPIKES), *WEIGHTS)


def vectors(gradient):
    quantize = sg.quantize.vector_quantize
    return compiled(
        lambda z: quantize(z, jnp.asarray(CODEBOOK), gradient=gradient).quantized,
        VECTOR,
    )


def ours():
    """Name -> what is called, times per round."""
    fast = sg.surrogate.fast_sigmoid(25.0)
    fire = lambda x: sg.surrogate.spike(x, fast, at_zero=0.0)
    affine = lambda x: sg.quantize.fake_quant_affine(x, 0.05, 0, -128, 127)
    return {
        "spiking network": (spiking(fire), 3),
        "fake_quant": (compiled(sg.quantize.fake_quant, MANY, *RANGE), 20),
        "fake_quant_affine": (compiled(affine, MANY), 20),
        "vector_quantize": (vectors("straight_through"), 5),
        "vector_quantize, rotation": (vectors("rotation"), 5),
        "gumbel_softmax": (
            compiled(lambda x: sg.sample.gumbel_softmax(KEY, x, 1.0), LOGITS),
            5,
        ),
        "reinmax": (compiled(lambda x: sg.sample.reinmax(KEY, x), LOGITS), 5),
    }


def hand_written():
    codebook = jnp.asarray(CODEBOOK)
    return {
        "spiking network": spiking(fired),
        "fake_quant": compiled(fake_by_hand, MANY, *RANGE),
        "vector_quantize": compiled(lambda z: quantize_by_hand(z, codebook), VECTOR),
        "gumbel_softmax": compiled(lambda x: gumbel_by_hand(KEY, x), LOGITS),
        "reinmax": compiled(lambda x: reinmax_by_hand(KEY, x), LOGITS),
    }


# The libraries -----------------------------------------------------------------------


def tensorflow():
    import tensorflow as tf

    ct, args = tf.constant(normal(*MANY.shape)), [tf.constant(a) for a in RANGE]
    x = tf.constant(MANY)

    @tf.function
    def step(x, low, high):
        with tf.GradientTape() as tape:
            tape.watch([x, low, high])
            value = tf.quantization.fake_quant_with_min_max_vars(x, low, high)
            loss = tf.reduce_sum(value * ct)
        return loss, tape.gradient(loss, [x, low, high])

    return {"fake_quant": lambda: step(x, *args)[0].numpy()}


def torch_libraries():
    import snntorch
    import torch
    from reinmax import reinmax
    from torch.nn.functional import gumbel_softmax
    from vector_quantize_pytorch import VectorQuantize

    torch.set_num_threads(1)

    def eager(fun, *args):
        leaves = [torch.tensor(a, requires_grad=True) for a in args]
        ct = torch.tensor(normal(*fun(*leaves).shape))
        return lambda: torch.autograd.grad((fun(*leaves) * ct).sum(), leaves)[0].sum()

    def leaky():
        fire = snntorch.surrogate.fast_sigmoid(25)
        return snntorch.Leaky(0.9, 1.0, spike_grad=fire, init_hidden=False)

    spikes = torch.tensor(SPIKES)

    def spiking(w, v):
        first, second = leaky(), leaky()
        a, b, total = first.init_leaky(), second.init_leaky(), 0.0
        for x in spikes:
            fired, a = first(x @ w, a)
            out, b = second(fired @ v, b)
            total = total + out
        return total

    def vectors(rotation):
        made = VectorQuantize(
            dim=WIDTH,
            codebook_size=CODES,
            rotation_trick=rotation,
            learnable_codebook=True,
            ema_update=False,
        )
        made._codebook.embed.data = torch.tensor(CODEBOOK)[None]
        return lambda z: made(z[None])[0][0]

    affine = torch.fake_quantize_per_tensor_affine
    return {
        "spiking network": eager(spiking, *WEIGHTS),
        "fake_quant_affine": eager(lambda x: affine(x, 0.05, 0, -128, 127), MANY),
        "vector_quantize": eager(vectors(False), VECTOR),
        "vector_quantize, rotation": eager(vectors(True), VECTOR),
        "gumbel_softmax": eager(lambda x: gumbel_softmax(x, 1.0, True), LOGITS),
        "reinmax": eager(lambda x: reinmax(x, 1.0)[0], LOGITS),
    }


def rows():
    """One row for each estimator and what it is measured against."""
    sides = {"by hand": hand_written()}
    if importlib.util.find_spec("tensorflow"):
        sides["TensorFlow"] = tensorflow()
    if importlib.util.find_spec("snntorch"):
        sides["torch"] = torch_libraries()
    for name, (mine, times) in ours().items():
        for side, calls in sides.items():
            if name in calls:
                pair = (repeated(f, times=times) for f in (mine, calls[name]))
                row = side_by_side(*pair, rounds=7)
                row["ours"], row["theirs"] = row["ours"] / times, row["theirs"] / times
                yield f"h. {name}, {side}", row


if __name__ == "__main__":
    for label, row in rows():
        print(f"{label:44}", ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
