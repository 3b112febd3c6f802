"""Models as their authors wrote them: no name, no trace of this library."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def features(self, x):
        x = nnx.relu(self.conv1(x))
        return nnx.relu(self.norm(self.conv2(x)))

    def __call__(self, x):
        feat = self.dropout(self.features(x))
        pooled = feat.mean(axis=(1, 2))
        return self.head(pooled)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        feat = nn.relu(nn.Conv(4, (3, 3))(x))
        normed = nn.BatchNorm(use_running_average=False)(feat)
        return nn.Dense(3)(normed.mean(axis=(1, 2)))


class Eqx(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 4, 3, dtype=jnp.float32, key=keys[0])
        self.head = eqx.nn.Linear(4, 3, dtype=jnp.float32, key=keys[1])

    def __call__(self, x):
        feat = jax.nn.relu(self.conv(x))
        return self.head(feat.mean(axis=(1, 2)))


class Haiku(hk.Module):
    def __call__(self, x):
        feat = jax.nn.relu(hk.Conv2D(4, 3)(x))
        return hk.Linear(3)(feat.mean(axis=(1, 2)))


def encode(w, x):
    mean = jnp.tanh(w * x)
    spread = jnp.exp(w + x)
    return mean, spread


def autoencode(w, x):
    mu, sigma = encode(w, x)
    code = mu * sigma
    return jnp.sum(code**2)


def plain(w, x):
    feat = jnp.tanh(w * x)
    return jnp.sum(feat**2)


def logged(fun):
    @functools.wraps(fun)
    def wrapper(*args):
        out = fun(*args)
        return out

    return wrapper


@logged
def decorated(w, x):
    feat = jnp.tanh(w * x)
    return jnp.sum(feat**2)


def two(w, x):
    feat = jnp.tanh(w * x)
    feat = feat + 1.0
    return jnp.sum(feat)


def block(x):
    h = jnp.sin(x)
    return h * 2.0


def other(x):
    h = jnp.cos(x)
    return h * 3.0


def both(x):
    return block(x) + other(x)
