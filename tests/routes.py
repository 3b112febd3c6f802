"""Functions and an object that arrays reach by one way, or by two."""

import jax.numpy as jnp


def two(a, b):
    return jnp.sum(jnp.sin(a) * b)


def tree(a, b):
    return jnp.sum(a * jnp.cos(b["z"]))


class Net:
    def __init__(self, h, scale=2.0):
        self.h, self.scale = h, scale

    def out(self, z):
        return jnp.sum(z * self.h) * self.scale

    def keep(self, h):
        self.h = h
        return self.out(h)

    def __call__(self, z):
        return jnp.sum(jnp.cos(z) + self.h)

    def through(self, u):
        return self.out(u)
