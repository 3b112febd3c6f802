"""Random small programs with right derivatives, and with one wrong rule in them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import stopgrad_jax as sg

SIZE = 3


@jax.custom_vjp
def right_vjp(x, w):
    return jnp.sin(x) * w


right_vjp.defvjp(
    lambda x, w: (right_vjp(x, w), (x, w)),
    lambda r, ct: (ct * jnp.cos(r[0]) * r[1], ct * jnp.sin(r[0])),
)


@jax.custom_jvp
def right_jvp(x, w):
    return jnp.tanh(x + w) + x


@right_jvp.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    slope = 1 - jnp.tanh(x + w) ** 2
    return right_jvp(x, w), slope * (dx + dw) + dx


@jax.custom_gradient
def right_gradient(x):
    return x * jnp.cos(x), lambda ct: (ct * (jnp.cos(x) - x * jnp.sin(x)),)


right_backward = sg.with_backward(
    lambda x, w: x * w + x, lambda ct, out, x, w: (ct * (w + 1), ct * x)
)


def wrong(kind, slope):
    """Make a rule that is wrong by name `planted`, in one of four ways."""

    @jax.custom_vjp
    def planted(x, w):
        return jnp.sin(x) * w + x

    def backward(r, ct):
        x, w = r
        by_x, by_w = ct * (jnp.cos(x) * w + 1), ct * jnp.sin(x)
        if kind == "factor":
            return slope * by_x, slope * by_w
        if kind == "sign":
            return -by_x, by_w
        return (ct * jnp.cos(x) * w, by_w) if kind == "term" else (by_x, 0 * by_w)

    planted.defvjp(lambda x, w: (planted(x, w), (x, w)), backward)
    return planted


KINDS = ("factor", "sign", "term", "operand")
TABLE = np.linspace(0.5, 1.5, SIZE, dtype=np.float32)


@jax.custom_vjp
def with_table(x):
    return x**2 * TABLE


with_table.defvjp(
    lambda x: (with_table(x), x), lambda x, ct: (2 * x * jnp.asarray(TABLE) * ct,)
)

LAYERS = {
    "sin": lambda x, w: jnp.sin(x) + w,
    "tanh": lambda x, w: jnp.tanh(x * w),
    "softmax": lambda x, w: jax.nn.softmax(x) * w,
    "sum": lambda x, w: x + jnp.sum(x * w),
    "stop": lambda x, w: x * lax.stop_gradient(jnp.cos(x)) + w,
    "stop w": lambda x, w: x * lax.stop_gradient(w) + jnp.sin(w),
    "by hand": lambda x, w: x + lax.stop_gradient(jnp.round(x) - x) + w * x,
    "through": lambda x, w: sg.straight_through(jnp.sign, jnp.tanh)(x) * w + x,
    "scale": lambda x, w: sg.scale_gradient(jnp.sin(x), 0.3) + w,
    "reverse": lambda x, w: sg.reverse_gradient(x) * w,
    "clip": lambda x, w: sg.clip_gradient(x, -1e-3, 1e-3) + w,
    "vjp": right_vjp,
    "jvp": right_jvp,
    "gradient": lambda x, w: right_gradient(x) + w,
    "backward": right_backward,
    "table": lambda x, w: with_table(x) * w,
    "offset": lambda x, w: (x + 100.0) - 100.0 + w,
    "unused": lambda x, w: x + w + 0 * len(wrong("sign", 1)(x, w)),
    "dead": lambda x, w: w * x + lax.stop_gradient(wrong("sign", 1)(x, w)),
    "norm": lambda x, w: x / jnp.linalg.norm(x + 2) + w,
}


def _scanned(layer):
    return lambda x, w: lax.scan(
        lambda c, w: (layer(c, w) / 2, c), x, w * jnp.ones((2, SIZE))
    )[0]


AROUND = {
    "plain": lambda layer: layer,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": _scanned,
    "cond": lambda layer: (
        lambda x, w: lax.cond(jnp.sum(x) > 0, layer, lambda x, w: x * w, x, w)
    ),
    "branch": lambda layer: (
        lambda x, w: lax.cond(True, layer, lambda x, w: x * w, x, w)
    ),
    "vmap": lambda layer: lambda x, w: jax.vmap(layer)(x[None], w[None])[0],
    "twice": lambda layer: lambda x, w: layer(x, w) + layer(w, x) / 3,
}


def program(seed, planted=False):
    """Return a function of two vectors, and the names of what it is made of."""
    rng = np.random.RandomState(seed)
    chosen = [
        (rng.choice(list(AROUND)), rng.choice(list(LAYERS)))
        for _ in range(rng.randint(1, 4))
    ]
    layers = [AROUND[a](LAYERS[n]) for a, n in chosen]
    if planted:
        kind = rng.choice(KINDS)
        around = rng.choice([a for a in AROUND if a != "cond"])
        place = rng.randint(len(layers) + 1)
        layers.insert(place, AROUND[around](wrong(kind, 0.9)))
        chosen.insert(place, (around, f"planted {kind}"))
    scalar = bool(rng.randint(2))

    def run(x, w):
        for layer in layers:
            x = layer(x, w)
        return jnp.sum(x * jnp.arange(1.0, 1 + SIZE)) if scalar else x

    x, w = rng.uniform(0.2, 1.2, SIZE), rng.uniform(0.3, 1.3, SIZE)
    return run, (jnp.asarray(x, "float32"), jnp.asarray(w, "float32")), chosen
