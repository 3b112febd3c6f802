"""Random loops with names in them: what `flow` says of each against a hand-made sum.

`STOPGRAD_EXAMPLES=2000 pytest tests/test_flow_loops.py` tries as many.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
COUNT = int(os.environ.get("STOPGRAD_EXAMPLES", "24"))
NAMES, STEPS = ("h", "k"), 3
CUTS = [lax.stop_gradient, lambda v: jnp.floor(v) + 0.7, lambda v: (v > 0) + 0.5]
SMOOTH = [jnp.sin, jnp.tanh, lambda v: 0.5 * v + 0.1, lambda v: v]


def expression(rng, pool):
    """Return a function of the values of a pool: a term or two, a cut now and then."""
    which = rng.integers(len(pool), size=rng.integers(1, 3))
    functions = [
        CUTS[rng.integers(len(CUTS))]
        if rng.random() < 0.25
        else SMOOTH[rng.integers(len(SMOOTH))]
        for _ in which
    ]
    product = rng.random() < 0.3

    def run(values):
        terms = [f(values[k]) for f, k in zip(functions, which, strict=True)]
        return terms[0] * terms[-1] if product else sum(terms)

    return run


def other(carry, step):
    """The branch that is not taken."""
    return (0.4 * jnp.ones(()),) * len(carry), (jnp.ones(()),)


def around(rng):
    """Return a way to hold the body of a loop."""
    ways = [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda *args: lax.cond(args[-1] > -9.0, f, other, *args),
    ]
    return ways[rng.integers(len(ways))]


def program(seed, named, rounds=STEPS):
    """Make a function of x and y out of a seed; `named(value, name, step)` is in it."""
    rng = np.random.default_rng(seed)
    carries = int(rng.integers(1, 4))
    closed = f32(*rng.uniform(0.3, 1.2, 2))
    pool = [*range(carries), *"xyc"]
    firsts = [expression(rng, pool) for _ in NAMES]
    nexts = [expression(rng, [*pool, *NAMES]) for _ in range(carries)]
    hands = expression(rng, [*pool, *NAMES])
    starts = rng.integers(3, size=carries)
    hold, loop = around(rng), rng.integers(3)
    end = [expression(rng, range(carries + 1)), expression(rng, range(carries + 1))]

    def run(x, y, extra=None):
        def body(carry, step):
            values = [*carry, x, y, closed[0]]
            inner = [
                named(first(values), name, step, extra)
                for name, first in zip(NAMES, firsts, strict=True)
            ]
            values += inner
            return [f(values) for f in nexts], hands(values)

        held = hold(lambda carry, step: tuple(map(tuple, _both(body, carry, step))))
        start = [(f32(0.4)[0], closed[1], x)[k] for k in starts]
        steps = jnp.arange(float(rounds))
        if loop == 0:
            carry, ys = lax.scan(lambda c, k: _split(held(c, k)), tuple(start), steps)
            last = jnp.sum(ys)
        elif loop == 1:
            step = lambda k, c: held(c, 1.0 * k)[0]
            carry, last = lax.fori_loop(0, rounds, step, tuple(start)), x
        else:
            carry, last = tuple(start), jnp.zeros(())
            for k in range(rounds):
                carry, (out,) = held(carry, steps[k])
                last = last + out
        values = [*carry, last]
        return sum(f(values) for f in end)

    return run


def _both(body, carry, step):
    carry, out = body(list(carry), step)
    return carry, [out]


def _split(pair):
    carry, (out,) = pair
    return carry, out


def by_name(value, name, step, extra):
    return sg.name(value, name)


def by_hand(value, name, step, extra):
    return value + extra[name][jnp.asarray(step, int)]


@pytest.mark.parametrize("seed", range(COUNT))
def test_names_in_a_loop(seed):
    f, zeros = program(seed, by_name), {name: jnp.zeros(STEPS) for name in NAMES}
    rng = np.random.default_rng(seed)
    points = [tuple(f32(*rng.uniform(0.3, 1.2, 2))) for _ in range(3)]

    def by_hand_of(rounds):
        grad = jax.jit(jax.grad(program(seed, by_hand, rounds), (0, 1, 2)))
        found = [grad(*point, zeros) for point in points]
        sums = {name: [g[2][name] for g in found] for name in NAMES}
        return {"x": [g[0] for g in found], "y": [g[1] for g in found], **sums}

    every, fewer = by_hand_of(STEPS), [by_hand_of(k) for k in range(1, STEPS)]
    flow = sg.flow(f, xs=list(every))(*points[0])
    found = sg.gradients(f, list(every))(*points[0])
    for (name, expected), gradient in zip(every.items(), found, strict=True):
        zero = not np.any(np.asarray(expected))
        if zero and any(np.any(np.asarray(each[name])) for each in fewer):
            continue  # a loop is followed as one of any number of rounds
        rows = [row.status for row in flow.inputs if row.path.split("/")[0] == name]
        alone = sg.flow(f, xs=name)(*points[0]).inputs
        for status in (rows, [r.status for r in alone if r.status != "data"]):
            assert (not {*status} - {"cut", "unused"}) == zero, (name, status)
        if len({status == "flows" for status in rows}) == 1:  # not some of a few calls
            (sg.assert_no_gradient if zero else sg.assert_gradient)(f, name)(*points[0])
        leaves = gradient if isinstance(gradient, tuple) else (gradient,)
        assert all(leaf is None for leaf in leaves) == zero
        if not zero:
            gradient = jnp.stack([0.0 if leaf is None else leaf for leaf in leaves])
            gradient = jnp.reshape(gradient, jnp.shape(expected[0]))
            np.testing.assert_allclose(gradient, expected[0], rtol=1e-4, atol=1e-6)


@jax.custom_vjp
def cell(c, d):
    return c * d, c + d


cell.defvjp(lambda c, d: (cell(c, d), d), lambda d, ct: (ct[0] * d, ct[1]))


@jax.custom_jvp
def pushed(c, d):
    return c * d, c + d


pushed.defjvp(lambda p, t: (pushed(*p), (t[0] * p[1], t[1])))


def rounded(c, d):
    return jnp.sin(c) * d, jnp.round(c) + d


def stopped(c, d):
    new = jnp.sin(c) * d
    return new, jax.lax.stop_gradient(new) + d


def scanned(f):
    return lambda b, d: jax.lax.scan(lambda c, _: f(c, d), b, None, length=2)[1].sum()


def looped(f):
    def loop(b, d):
        return jax.lax.fori_loop(0, 2, lambda i, c: f(c[0], d), (b, d))[1].sum()

    return loop


@pytest.mark.parametrize("loop", [scanned, looped], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (cell, "custom rule of cell returns zero"),
        (pushed, "custom rule of pushed returns zero"),
        (rounded, "derivative of round is zero"),
        (stopped, "stop_gradient, on purpose"),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_what_only_goes_round_a_loop_ends_where_it_leaves(f, reason, loop):
    """The carry takes the gradient of `b` on, and nothing that is returned does."""
    x, f = jnp.arange(1.0, 4.0, dtype=jnp.float32), loop(f)
    assert not np.any(jax.grad(f)(x, x + 1))
    assert np.any(f(x, x + 1) != f(x + 1, x + 1))
    flow = sg.flow(f)(x, x + 1)
    assert [row.status for row in flow.inputs] == ["cut", "flows"]
    (cut,) = flow.cuts
    assert reason in cut.words
    assert "b" in cut.inputs
    for xs in ("b", ["b", "d"]):
        with pytest.raises(ValueError, match=f"b: .*{reason}"):
            sg.gradients(f, xs, unconnected_gradients="error")(x, x + 1)
    with pytest.raises(AssertionError, match=reason):
        sg.assert_gradient(f, "b", args=(x, x + 1))


def turns(drive, w):
    """A comparison hands its operand on, and the fraction goes round."""

    def body(state, _):
        phase, total = state
        phase = jnp.where(phase < 0, 0.0, phase)
        turns, phase = jnp.divmod(phase + drive, 1.0)
        return (phase, total + jnp.where(turns > 0, w, 0.0)), None

    start = jnp.zeros(3, jnp.float32), jnp.zeros(3, jnp.float32)
    return jax.lax.scan(body, start, None, length=5)[0][1].sum()


def test_a_comparison_on_the_way_round_is_no_end():
    x = f32(0.3, 0.5, 0.9)
    assert not np.any(jax.grad(turns)(x, x + 1))
    told = str(sg.flow(turns)(x, x + 1).explain("drive"))
    assert "the derivative of round, in jnp.divmod, is zero" in told
    assert "phase < 0" not in told


def distilled(teacher, student):
    p, q = jax.tree.map(jax.nn.softmax, (teacher, student))
    return -jnp.sum(lax.stop_gradient(p) * jnp.log(q))


def of_the_student(teacher, student):
    logits = {"t": teacher, "s": lax.stop_gradient(teacher) + student}
    q = {k: jax.nn.log_softmax(v) for k, v in logits.items()}
    return jnp.sum(lax.stop_gradient(q["t"]) * q["s"])


def in_few_bits(teacher, student):
    few = lambda z: sg.quantize.fake_quant(z, -1.0, 1.0, num_bits=4)
    q = jax.tree.map(few, {"t": teacher, "s": student})
    return jnp.sum((q["s"] - lax.stop_gradient(q["t"])) ** 2)


@pytest.mark.parametrize("f", [distilled, of_the_student, in_few_bits])
def test_one_expression_for_several_arrays_ends_none_that_it_hands_on(f):
    """Softmax stops its maximum, and the one that is stopped later is no other."""
    x = f32(0.3, 0.5, 0.9)
    flow = sg.flow(f)(x, x + 1)
    assert flow.cuts
    assert all("stop_gradient(" in cut.site.expr for cut in flow.cuts)
