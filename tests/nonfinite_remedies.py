"""Functions whose gradient is nan though their value is finite, for their remedies."""

import jax
import jax.numpy as jnp
import numpy as np
from programs import f32


def fewer_axes(w, x):
    keep = x.sum(-1) > 1.0
    return jnp.sum(jnp.where(keep[:, None], jnp.log(w * x), 0.0))


def row_norm(w, x):
    y = w * x
    n = jnp.linalg.norm(y, axis=-1)
    return jnp.sum(jnp.where(x.sum(-1) > 0, n, 0.0))


def leading(w, x):
    keep = x[:, 0] > 0
    return jnp.sum(jnp.where(keep, jnp.log(w * x).sum(-1), 0.0))


def other_b(w, x):
    b = x - 1.0

    def quotient(a, b):
        return a / b

    q = quotient(w, b)
    return jnp.sum(jnp.where(b != 0, q, 0.0))


def divisor_name(w, x):
    b = w * 2.0
    d = x - 1.0
    return jnp.sum(jnp.where(d != 0, b / d, 0.0))


def select(w, x):
    return jnp.sum(jnp.select([x > 0, x < 0], [jnp.log(w * x), x], 0.0))


def inverted(w, x):
    empty = x == 0
    return jnp.sum(jnp.where(~empty, jnp.sqrt(w * x), 0.0))


def rebound(w, x):
    y = jnp.sqrt(w * x)
    x = x + 1.0
    return jnp.sum(jnp.where(x > 1.0, y, 0.0))


def lax_select(w, x):
    return jnp.sum(jax.lax.select(x > 0, jnp.sqrt(w * x), jnp.zeros_like(x)))


def where_of_a_sum(w, x):
    y = jnp.sqrt(w * x)
    return jnp.sum(y, where=x > 0)


def multi_use(w, x):
    n = jnp.sqrt(w * x)
    return jnp.sum(jnp.where(x > 0, n, 0.0)) + jnp.sum(jnp.where(x > 0, n * x, 0.0))


def same_twice(w, x):
    return jnp.sum(jnp.where(x > 0, jnp.log(w * x) * jnp.log(w * x), 0.0))


def chain(w, x):
    u = w * x
    return jnp.sum(jnp.where(u > 0, jnp.exp(jnp.log(u) * 0.5), 0.0))


def power(w, x):
    return jnp.sum(jnp.where(x > 0, (w * x) ** 0.5, 0.0))


def arctan(w, x):
    return jnp.sum(jnp.where(x > 0, jnp.arctan2(w * x, x), 0.0))


def augmented(w, x):
    total = w * 0.0
    total += jnp.sum(jnp.where(x > 0, jnp.log(w * x), 0.0))
    return total


def attention(w, x):
    mask = jnp.tril(jnp.ones((3, 3), bool)).at[1].set(False)
    keep = jnp.array([True, False, True])
    p = jax.nn.softmax(jnp.where(mask, w * x[:, None] * x, -jnp.inf), -1)
    y = p @ (x * w)
    return jnp.sum(jnp.where(keep, y, 0.0) ** 2)


def attention_full(w, x):
    mask = jnp.zeros((3, 3), bool)
    s = jnp.where(mask, w * x[:, None] * x, -jnp.inf)
    return jnp.sum(jax.nn.softmax(s, -1) @ x)


def minus_largest(w, x):
    s = jnp.full_like(x, -jnp.inf)
    s = s.at[0].set(w) - s.max()
    return jnp.sum(jnp.where(x > 0, s, 0.0))


def data_nan(w, x):
    m = jnp.isnan(x)
    return jnp.where(m, 0.0, x * w).sum()


def data_used_before(w, x):
    y = jnp.where(jnp.isnan(x), 0.0, jnp.tanh(x) * w)
    return y.sum()


def scanned(w, x):
    def step(total, x):
        root = jnp.sqrt(w * x)
        return total + jnp.where(x > 0, root, 0.0), None

    return jax.lax.scan(step, w, x)[0]


def example(w, x):
    keep = x.sum() > 0
    return jnp.where(keep, jnp.linalg.norm(w * x), 0.0)


def example_of_rows(w, x):
    keep = x.sum(-1) > 0
    norms = jnp.linalg.norm(w * x, axis=-1)
    return jnp.sum(jnp.where(keep, norms, 0.0))


def example_by_entries(w, x):
    return jnp.sum(jnp.where(x > 0, jnp.log(w * x), 0.0))


ENTRY, PAIR = f32(1.0, 0.0, 4.0), f32(1.0, 3.0)
ROWS = f32(1.0, 2.0, 0.0, 0.0).reshape(2, 2)
LONG = f32(1.0, 2.0, 2.0, 0.0, 0.0, 0.0).reshape(2, 3)
MISSING = f32(1.0, np.nan, 3.0)

# What is printed is an edit that does.
EDITED = [
    *((f, x) for f in (fewer_axes, row_norm, leading) for x in (ROWS, LONG)),
    *((f, PAIR) for f in (divisor_name, other_b)),
    (arctan, ENTRY),
    *((f, ENTRY) for f in (inverted, multi_use, same_twice, chain, power, augmented)),
    (scanned, ENTRY),
    (attention, f32(1.0, 2.0, 0.5)),
    *((f, MISSING) for f in (data_nan, data_used_before)),
]
# None is found, or it could not be written here; the report says the cause.
TOLD = [
    *((f, ENTRY) for f in (select, rebound, lax_select, where_of_a_sum)),
]
