"""Truncated scans: the forward pass of lax.scan, a gradient through K steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, f32, instructions, mesh

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "
scan = sg.recurrent.truncated_scan


def cell(w):
    """One step of a small recurrent network."""

    def step(carry, x):
        h = jnp.tanh(w * carry["h"] + x)
        return {"h": h, "n": carry["n"] + 1}, jnp.sin(h)

    return step


def start(h=0.5):
    return {"h": jnp.asarray(h, jnp.float32), "n": jnp.int32(0)}


def same_bits(a, b):
    assert_same_bits(a.reshape(-1), b.reshape(-1))


XS = np.linspace(-1, 1, 10).astype(np.float32)


def by_hand(w, h, xs, every, reverse=False):
    """Write it as a Python loop with a stop; return the carry and the outputs."""
    outs = []
    for count, x in enumerate(xs[::-1] if reverse else xs):
        if count and count % every == 0:
            h = jax.lax.stop_gradient(h)
        h = jnp.tanh(w * h + x)
        outs.append(jnp.sin(h))
    return h, jnp.stack(outs[::-1] if reverse else outs)


@pytest.mark.parametrize("reverse", [False, True], ids=["onward", "reverse"])
@pytest.mark.parametrize(("every", "unroll"), [(1, 1), (3, 1), (4, 4), (9, 2), (99, 1)])
def test_bits_of_the_scan_and_gradients_of_the_loop(every, unroll, reverse, run):
    w, h, xs = jnp.float32(0.9), jnp.float32(0.5), jnp.asarray(XS)
    options = {"reverse": reverse, "unroll": unroll}

    def ours(w, h, xs):
        carry, ys = scan(cell(w), start(h), xs, every=every, **options)
        return carry["h"], ys

    plain = run(lambda w: jax.lax.scan(cell(w), start(h), xs, **options))(w)
    jax.tree.map(
        same_bits,
        run(lambda w: scan(cell(w), start(h), xs, every=every, **options))(w),
        plain,
    )
    loop = lambda w, h, xs: by_hand(w, h, xs, every, reverse)
    weight = jnp.arange(1, 11, dtype=jnp.float32)
    for loss in (lambda h, ys: h, lambda h, ys: jnp.vdot(weight, ys)):
        grads = [
            run(jax.grad(lambda *a, f=f, loss=loss: loss(*f(*a)), (0, 1, 2)))(w, h, xs)
            for f in (ours, loop)
        ]
        for a, b in zip(*grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_closed_form():
    """c = w c + 1 from 0: dc/dw at 1 is what the last stretch adds."""

    def grad(length, every):
        def final(w):
            return scan(lambda c, x: (w * c + x, None), 0.0, ones, every=every)[0]

        ones = jnp.ones(length, jnp.float32)
        return jax.grad(final)(1.0)

    for length in (1, 4, 5, 6, 7):
        for every in range(1, 9):
            last = (length - 1) // every * every  # where the last stretch begins
            assert grad(length, every) == sum(range(last, length))


@pytest.mark.parametrize("integer", [np.int64, np.array, jnp.int32])
def test_a_period_is_anything_that_is_one_int(integer):
    run = lambda every: scan(cell(1.0), start(), XS, every=every)
    jax.tree.map(np.testing.assert_array_equal, run(integer(2)), run(2))


def test_only_the_carry_is_stopped():
    """Parameters, inputs and the first carry learn; at 1 nothing passes in between."""

    def total(w, b, h, xs):
        step = lambda h, x: (w * h + b * x, w * h + b * x)
        return jnp.sum(scan(step, h, xs, every=1)[1])

    args = (2.0, 3.0, 5.0, f32(1.0, 1.0, 1.0))
    grads = jax.grad(total, (0, 1, 2, 3))(*args)
    assert grads[0] == 5 + 13 + 29  # the carries themselves
    assert grads[1] == 3
    assert grads[2] == 2
    np.testing.assert_array_equal(grads[3], [3, 3, 3])


def test_both_modes_and_orders():
    loss = lambda w: jnp.sum(scan(cell(w), start(), XS, every=3)[1])
    looped = lambda w: jnp.sum(by_hand(w, jnp.float32(0.5), XS, 3)[1])
    w = jnp.float32(0.9)
    np.testing.assert_allclose(jax.jacfwd(loss)(w), jax.grad(loss)(w), rtol=1e-5)
    for first in (jax.grad, jax.jacfwd):
        for second in (jax.grad, jax.jacfwd):
            ours, theirs = second(first(loss))(w), second(first(looped))(w)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_without_xs():
    step = lambda c, x: (2 * c, c)
    for length in (4, np.int64(4)):
        carry, ys = scan(step, 1.0, length=length, every=2)
        assert carry == 16
        np.testing.assert_array_equal(ys, [1, 2, 4, 8])
    final = lambda c, every: scan(step, c, None, 4, every=every)[0]
    assert jax.grad(final)(1.0, 4) == 16
    assert jax.grad(final)(1.0, 2) == 0
    empty = scan(lambda c, x: (c + x, c), 1.0, jnp.zeros(0, jnp.float32), every=2)
    assert empty[0] == 1
    assert empty[1].shape == (0,)


def test_a_nan_behind_a_stop_stays_there():
    step = lambda c, x: (jnp.sqrt(c) * 0 + x, None)  # infinite slope at 0
    f = lambda c: scan(step, c, f32(1.0, 0.0, 4.0), every=2)[0]
    assert jax.grad(f)(1.0) == 0


def test_carries_of_several_leaves_and_narrow_floats():
    init = {"a": jnp.ones(3, jnp.bfloat16), "b": (1.0, 2), "key": jax.random.key(0)}

    def step(c, x):
        key, other = jax.random.split(c["key"])
        noise = jax.random.uniform(other, (), jnp.float32)
        a, (b, n) = c["a"] * 2, c["b"]
        return {"a": a, "b": (b * 3 + noise, n + 1), "key": key}, b

    ours = scan(step, init, None, 5, every=2)
    theirs = jax.lax.scan(step, init, None, 5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        same_bits(a, b)
    f = lambda b: scan(step, {**init, "b": (b, 2)}, None, 3, every=3)[0]["b"][0]
    assert jax.grad(f)(1.0) == 27


def _sharded(f, hs):
    return jax.shard_map(
        lambda hs: jax.vmap(f)(hs), mesh=mesh(), in_specs=P("d"), out_specs=P("d")
    )(hs)


WAYS = {
    "jit": lambda f, hs: jnp.stack([jax.jit(f)(h) for h in hs]),
    "vmap": lambda f, hs: jax.vmap(f)(hs),
    "map": lambda f, hs: jax.lax.map(f, hs),
    "scan of scan": lambda f, hs: jax.lax.scan(lambda c, h: (c, f(h)), 0, hs)[1],
    "remat": lambda f, hs: jax.vmap(jax.checkpoint(f))(hs),
    "cond": lambda f, hs: jax.lax.cond(hs[0] < 9, jax.vmap(f), lambda x: x, hs),
    "shard_map": _sharded,
}
if jax.config.jax_check_tracer_leaks:
    del WAYS["shard_map"]  # as in programs.EVERYWHERE


@pytest.mark.parametrize("inner", [lambda f: f, jax.checkpoint], ids=["", "remat"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_under_every_transform(way, inner):
    hs, w = f32(-0.5, 0.1, 0.4, 0.8), jnp.float32(0.9)

    def ours(w, h):
        return jnp.sum(scan(inner(cell(w)), start(h), jnp.asarray(XS), every=4)[1])

    total = lambda w, hs: jnp.sum(way(lambda h: ours(w, h), hs))
    loops = [lambda w, h: jnp.sum(by_hand(w, h, XS, 4)[1])]
    expected = lambda w, hs: sum(loops[0](w, h) for h in hs)
    for a, b in zip(
        jax.grad(total, (0, 1))(w, hs), jax.grad(expected, (0, 1))(w, hs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5)


def test_no_instruction_more_than_by_hand():
    xs, w = jnp.asarray(XS), jnp.float32(0.9)
    step = lambda w: lambda c, x: (jnp.tanh(w * c + x), None)
    passes = np.arange(10) % 4 != 0
    passes[0] = True

    def theirs(w):
        def stopped(c, inputs):
            x, passing = inputs
            return step(w)(jnp.where(passing, c, jax.lax.stop_gradient(c)), x)

        return jax.lax.scan(stopped, jnp.float32(0.5), (xs, passes))[0]

    ours = lambda w: scan(step(w), jnp.float32(0.5), xs, every=4)[0]
    plain = lambda w: jax.lax.scan(step(w), jnp.float32(0.5), xs)[0]
    never = lambda w: scan(step(w), jnp.float32(0.5), xs, every=10)[0]
    for take in (lambda f: f, jax.value_and_grad, jax.jacfwd):
        assert instructions(take(ours), w) <= instructions(take(theirs), w)
        assert instructions(take(never), w) == instructions(take(plain), w)
    assert instructions(ours, w) == instructions(plain, w)


def test_no_step_is_traced_again():
    traces = []

    def step(c, x):
        traces.append(1)
        return c * x, None

    f = jax.jit(jax.grad(lambda c: scan(step, c, jnp.asarray(XS), every=2)[0]))
    f(1.0)
    count = len(traces)
    f(2.0)
    assert len(traces) == count


def test_what_is_refused():
    step, xs = lambda c, x: (c, x), f32(1.0, 2.0)
    refused = {
        r"every=(0|-3)\): every is an int, at least 1": (
            ValueError,
            [lambda n=n: scan(step, 0.0, xs, every=n) for n in (0, -3)],
        ),
        "every is an int, at least 1": (
            TypeError,
            [
                *[lambda n=n: scan(step, 0.0, xs, every=n) for n in (2.0, None, True)],
                lambda: jax.jit(lambda n: scan(step, 0.0, xs, every=n))(2),
            ],
        ),
        "an array in xs with an axis to step along, or a length": (
            ValueError,
            [
                lambda: scan(step, 0.0, None, every=1),
                lambda: scan(step, 0.0, (), every=1),
            ],
        ),
        "at least one leaf that carries a gradient": (
            TypeError,
            [
                lambda: scan(step, 0, xs, every=1),
                lambda: scan(step, None, xs, every=1),
            ],
        ),
    }
    for words, (kind, calls) in refused.items():
        for call in calls:
            with pytest.raises(kind, match=r"truncated_scan\(.*" + words + BEATS):
                call()
    with pytest.raises(ValueError, match="scan"):  # JAX's own words
        scan(step, 0.0, (xs, f32(1.0)), every=1)
    with pytest.raises(ValueError, match="scan"):
        scan(step, 0.0, xs, 3, every=1)
