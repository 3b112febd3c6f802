"""Statements in which one call of C code, as of `sum`, runs Python repeatedly."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from programs import f32

PARTS = [f32(0.3, 0.7), f32(0.6, 1.4), f32(1.3, 1.7)]
SQUARES = [np.sum(np.square(np.array(p))) for p in PARTS]
NOTES = []


def note(x):
    NOTES.append(x)
    return x


def square(x):
    return jnp.sum(x**2)


def wave(x):
    return jnp.sum(jnp.sin(x) * x)


def linear(x):
    return x * 2.0 + 1.0


def squash(x):
    return jnp.tanh(x) * 0.5


def chained(*functions):
    def apply(x):
        for function in functions:
            x = function(x)
        return x

    return apply


def noted(fun, args):
    NOTES.clear()
    fun(*args)
    values = tuple(NOTES)
    return values[0] if len(values) == 1 else values


# -- one execution ---


def over_a_list(p):
    y = sum(jnp.sum(w**2) for w in p)
    return note(y)


def over_values(p):
    y = sum(jnp.sum(w**2) for w in dict(enumerate(p)).values())
    return note(y)


def over_pairs(p):
    y = sum(jnp.vdot(u, v) * k for k, (u, v) in enumerate(zip(p, p, strict=True)))
    return note(y)


def over_leaves(p):
    y = 0.5 * sum(wave(w) for w in jax.tree.leaves({"a": p[0], "b": p[1:]}))
    return note(y)


def mapped(p):
    y = sum(map(wave, p))
    return note(y)


def nested(p):
    y = sum(sum(jnp.sin(u) for u in v) for v in p)
    return note(y)


def two_generators(p):
    y = jnp.sqrt(sum(square(v) for v in p) + sum(wave(v) for v in p))
    return note(y)


def in_a_branch(p):
    y = sum(wave(v) for v in p) if len(p) > 1 else wave(p[0])
    return note(y)


def with_a_start(p):
    y = sum((v**2 for v in p), start=jnp.ones(2))
    return note(y).sum()


def added_to(p):
    x = jnp.sum(p[0])
    y = x
    y += sum(wave(v) for v in p)
    return note(y)


def stored(p):
    parts = (wave(v) for v in p)
    y = jnp.sqrt(sum(parts))
    return note(y)


def returned(p):
    def parts():
        return (wave(v) for v in p)

    y = sum(parts())
    return note(y)


def yielded(p):
    def parts():
        yield square(p[0])
        yield from map(wave, p)

    y = sum(parts()) * 2.0
    return note(y)


def handed_on(p):
    def total(parts):
        result = 0.0
        for part in parts:
            result = result + part
        return result

    y = total(wave(v) for v in p)
    return note(y)


def handed_on_to_sum(p):
    y = (lambda parts: sum(parts))(wave(v) for v in p) * 2.0
    return note(y)


def from_a_generator(p):
    y = sum(v * 2.0 for v in (jnp.sin(u) for u in p))
    return note(y).sum()


def reduced(p):
    y = functools.reduce(lambda a, b: jnp.sin(a) * b, map(wave, p))
    return note(y)


def reduced_generator(p):
    y = functools.reduce(operator.mul, (wave(v) for v in p))
    return note(y)


def reduced_by_jax(p):
    y = functools.reduce(jnp.maximum, (wave(v) for v in p))
    return note(y)


def reduced_tree(p):
    y = jax.tree.reduce(operator.add, jax.tree.map(lambda a, b: wave(a * b), p, p))
    return note(y)


def accumulated(p):
    y = list(itertools.accumulate((wave(v) for v in p), lambda a, b: a * b))[-1] + 1.0
    return note(y)


def chosen_by_key(p):
    y = max((wave(v) for v in p), key=lambda x: (x * 2.0).ndim) * 3.0
    return note(y)


def sorted_by_key(p):
    y = sorted((wave(v) for v in p), key=lambda x: (x * 2.0).ndim)[0] * 3.0
    return note(y)


def stacked(p):
    y = jnp.stack(list(map(wave, p)))
    return note(y).sum()


def layers(p):
    y = chained(linear, squash, linear, squash)(p[0])
    return note(y).sum()


def layers_of_two_kinds(p):
    y = chained(linear, jnp.cos, linear)(p[0])
    return note(y).sum()


def layers_reduced(p):
    y = functools.reduce(lambda x, f: f(x), (linear, squash, linear), p[0])
    return note(y).sum()


def inside_an_expression(p):
    z = (y := sum(wave(v) for v in p)) * 2.0
    note(y)
    return z


# -- several ---


def in_a_loop(p):
    total = 0.0
    for q in (p, p[:2], p):
        y = sum(wave(v) for v in q)
        note(y)
        total = total + y
    return total


def side_by_side(p):
    for q in (p, p[:2]):
        y = sum(wave(v) for v in q)  # nothing lies between two executions
        note(y)
    return y


def side_by_side_of_arrays(p):
    for q in (p, p[:2], p):
        y = sum(q)
        note(y)
    return y.sum()


def side_by_side_mapped(p):
    for q in (p, p[:2]):
        y = jnp.sqrt(sum(map(wave, q)))
        note(y)
    return y


def in_two_loops(p):
    total = 0.0
    for _ in range(2):
        for q in (p, p[:2]):
            y = 0.1 * sum(wave(v) * square(v) for v in q) + total
            note(y)
            total = y
    return total


def in_a_helper(p):
    def norm(q):
        y = jnp.sqrt(sum(square(v) for v in q))
        return note(y)

    return norm(p) * norm(p[:2])


def in_a_helper_in_a_loop(p):
    def norm(q):
        y = sum(square(v) for v in q)
        return note(y)

    return sum(norm(p[:k]) for k in (1, 2, 3)) + sum(map(norm, (p, p)))


def in_a_helper_that_is_handed_a_generator(p):
    def total(parts):
        y = sum(v * 2.0 for v in parts)
        return note(y)

    return sum(total(wave(v) * k for v in p) for k in range(2))


def in_a_function_that_is_mapped(p):
    def one(q):
        y = jnp.sum(q**2) * 2.0
        return note(y)

    return sum(list(map(one, p)))


def in_a_function_that_reduces(p):
    def one(a, b):
        y = jnp.sin(a) * b
        return note(y)

    return jnp.sum(functools.reduce(one, p))


def in_a_key(p):
    def one(a):
        y = jnp.sum(jnp.sin(a) * a)
        return note(y).ndim

    return jnp.sum(sorted(p, key=one)[0])


def in_a_generator(p):
    z = sum((y := wave(v)) * 2.0 for v in p)  # noqa: F841
    for v in p:
        note(wave(v))
    return z


def in_a_stored_generator(p):
    parts = ((y := wave(v)) * 2.0 for v in p)  # noqa: F841
    for v in p:
        note(wave(v))
    return sum(parts)


def functions_in_a_loop(p):
    x = p[0]
    for layer in (linear, linear, squash, squash, linear):
        y = layer(x)
        note(y)
        x = y
    return x.sum()


def numbers_before_arrays(p):
    x = 1.0
    for v in p:
        y = x + v
        note(y)
        x = y
    return x.sum()


ONE = [
    *(
        over_a_list,
        over_values,
        over_pairs,
        over_leaves,
        mapped,
        nested,
        two_generators,
    ),
    *(in_a_branch, with_a_start, stored, returned, yielded, handed_on),
    *(handed_on_to_sum, from_a_generator, reduced, reduced_generator),
    *(reduced_by_jax, reduced_tree, accumulated, chosen_by_key, sorted_by_key, stacked),
    *(layers, layers_of_two_kinds, layers_reduced, inside_an_expression),
]
SEVERAL = [
    *(in_a_loop, side_by_side, side_by_side_of_arrays, side_by_side_mapped),
    *(in_two_loops, in_a_helper, in_a_helper_in_a_loop, in_a_key, in_a_generator),
    *(in_a_helper_that_is_handed_a_generator, in_a_function_that_is_mapped),
    *(in_a_function_that_reduces, in_a_stored_generator, functions_in_a_loop),
    *(numbers_before_arrays,),
]
