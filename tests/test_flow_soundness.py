"""Random programs: what `flow` calls cut or unused is zero, what flows is not."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

COUNT = int(os.environ.get("STOPGRAD_EXAMPLES", "400"))  # in all of the file
ZERO, SLOW = ("cut", "unused"), [HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(part):
    count = max(1, round(COUNT * part))
    return settings(max_examples=count, deadline=None, suppress_health_check=SLOW)


# -- operations: each takes two values of shape () or (2,) and returns one ----------


def vec(x):
    return jnp.broadcast_to(x, (2,))


@jax.custom_jvp
def no_rule(x):
    return jnp.sin(x)


no_rule.defjvp(lambda p, t: (no_rule(*p), jnp.zeros_like(t[0])))


@jax.custom_jvp
def half_rule(x, y):
    return x * y


half_rule.defjvp(lambda p, t: (half_rule(*p), t[0] * p[1] + 0.3 * t[0]))


@jax.custom_vjp
def half_back(x, y):
    return jnp.sin(x) + jnp.cos(y)


half_back.defvjp(
    lambda x, y: (half_back(x, y), x), lambda x, ct: (jnp.cos(x) * ct, None)
)


@jax.custom_vjp
def no_back(x):
    return x * x


no_back.defvjp(lambda x: (x * x, None), lambda _, ct: (None,))


def two(x, y):
    return jnp.sin(x) * 0.8 + y, jax.lax.stop_gradient(y) * 1.1


def grow(carry, _):
    a, b = carry
    return (a * 0.9 + b, jnp.sin(b) + 0.2), None


def shift(carry, x):
    a, b, c = carry
    return (b, c, jax.lax.stop_gradient(c) + x), a


def scanned(x, y):
    return jax.lax.scan(grow, (vec(x), vec(y)), None, length=3)[0][0]


def shifted(x, y):
    carry, out = jax.lax.scan(shift, (vec(x), vec(y), vec(x)), jnp.stack([vec(y)] * 2))
    return carry[0] + out[0]


def either(x, y):
    return jax.lax.cond(vec(x)[0] > 0, smooth, lambda x, y: x - 0.3 * y, x, y)


def one_of(x, y):
    stop = jax.lax.stop_gradient
    branches = [lambda x, y: x, lambda x, y: stop(x) + y, lambda x, y: stop(y) + x]
    return jax.lax.switch(vec(x)[0].astype(int), branches, vec(x), vec(y))


def smooth(x, y):
    return jnp.arcsinh(0.7 * x) + 0.6 * jnp.sin(y)


def cube(x):
    return 0.3 * (jnp.sin(x) + 1.4) ** 3


def backward(x, y):
    return sg.with_backward(lambda x, y: x + y, lambda ct, out, x, y: (ct, None))(
        vec(x), vec(y)
    )


# Smooth where they are differentiable, and connected to all of what they read or to
# nothing: at a generic point, what is connected by them has a gradient.
GENERIC = {
    "add": lambda x, y: 0.6 * x + 0.7 * y,
    "subtract": lambda x, y: 0.9 * x - 0.4 * y,
    "multiply": lambda x, y: (jnp.sin(x) + 1.7) * (jnp.sin(y) + 2.1) * 0.4,
    "divide": lambda x, y: (x + 0.1) / (2.3 + jnp.sin(y + 0.2)),
    "arcsinh": lambda x, y: jnp.arcsinh(x),
    "sin": lambda x, y: jnp.sin(1.2 * x + 0.3),
    "exp": lambda x, y: jnp.exp(0.4 * jnp.sin(x)) + 0.2 * y,
    "mean": lambda x, y: jnp.dot(vec(x), f32(0.4, 0.7)),
    "stack": lambda x, y: jnp.dot(
        jnp.concatenate([vec(x), vec(y)]), f32(0.1, 0.2, 0.3, 0.4)
    ),
    "stop": lambda x, y: jax.lax.stop_gradient(x),
    "stop one": lambda x, y: jax.lax.stop_gradient(x) + 0.4 * y,
    "round": lambda x, y: jnp.round(x) + 1.3,
    "floor, other": lambda x, y: jnp.floor(x) + 0.8 * y,
    "sign": lambda x, y: jnp.sign(x) * 1.1,
    "int": lambda x, y: x.astype(jnp.int32).astype(jnp.float32) + 0.4,
    "compare": lambda x, y: jnp.where(x > y, jnp.float32(1), jnp.float32(2)),
    "where": lambda x, y: jnp.where(jnp.round(x) > 0.1, y, 0.9 * y),
    "argmax": lambda x, y: (jnp.argmax(vec(x)) + 0.3) * (y + 2),
    "replaced": lambda x, y: vec(x).at[:].set(0.5 * vec(y)),
    "written": lambda x, y: vec(x).at[:].add(0.5 * vec(y)),
    "custom zero": lambda x, y: no_rule(x) + 0.3,
    "custom half": lambda x, y: half_rule(vec(x), vec(y) + 2.0),
    "back zero": lambda x, y: no_back(x) + 0.3 * y,
    "back half": lambda x, y: half_back(vec(x), vec(y)),
    "backward": backward,
    "jit": lambda x, y: jax.jit(two)(x, y)[0],
    "jit, stopped": lambda x, y: jax.jit(two)(x, y)[1],
    "remat": lambda x, y: jax.checkpoint(smooth)(x, y),
    "scan": scanned,
    "cond": either,
    "vmap": lambda x, y: jax.vmap(smooth)(vec(x), vec(y)),
    "grad": lambda x, y: y + jax.vmap(jax.grad(cube))(vec(x)),
    "scale": lambda x, y: sg.scale_gradient(x, 0.5),
    "reverse": lambda x, y: sg.reverse_gradient(x, 0.5),
    "value": lambda x, y: sg.replace_value(vec(x), vec(y)),
    "straight": lambda x, y: sg.straight_through(jnp.round)(x),
}
# May be zero where they are connected.
OTHERS = {
    "relu": lambda x, y: jax.nn.relu(x) - y,
    "clip": lambda x, y: jnp.clip(x, -0.1, y),
    "cancel": lambda x, y: x - x + y,
    "times zero": lambda x, y: x * 0 + y,
    "scale zero": lambda x, y: sg.scale_gradient(x, 0.0),
    "maximum": jnp.maximum,
    "first": lambda x, y: vec(x)[0] + y,
    "index": lambda x, y: vec(x)[jnp.argmax(vec(y))],
    "set": lambda x, y: vec(x).at[0].set(vec(y)[1]),
    "set twice": lambda x, y: vec(x).at[0].set(vec(y)[0]).at[1].set(1.0),
    "set all": lambda x, y: vec(x).at[0].set(2.0).at[1].set(vec(y)[0]),
    "set at": lambda x, y: vec(x).at[(vec(y)[0] > 0).astype(int)].set(vec(y)[1]),
    "update": lambda x, y: jax.lax.dynamic_update_slice(vec(x), vec(y)[:1], (1,)),
    "update at": lambda x, y: jax.lax.dynamic_update_slice(
        vec(x), vec(y)[:1], (jnp.argmin(vec(x)),)
    ),
    "part": lambda x, y: jnp.concatenate([vec(x), vec(y)])[1:3],
    "own part": lambda x, y: jnp.concatenate([vec(x), vec(y)])[2:],
    "sort": lambda x, y: jnp.sort(vec(x)) * y,
    "order": lambda x, y: vec(y)[jnp.argsort(vec(x))],
    "shift": shifted,
    "switch": one_of,
    "top": lambda x, y: jax.lax.top_k(vec(x), 1)[1][0].astype(jnp.float32) * y,
}
ALL = GENERIC | OTHERS
CHEAP = [n for n in ALL if n not in ("scan", "shift", "cond", "switch")]
LEAVES = ("a", "b", "p/u", "p/v")


def programs(names):
    index = st.integers(0, 10)
    step = st.tuples(st.sampled_from(sorted(names)), index, index)
    steps = st.lists(step, min_size=1, max_size=6)
    return st.tuples(steps, st.lists(index, min_size=1, max_size=3))


def build(program):
    """The function of a, b and p that a program stands for; newer values first."""
    steps, results = program

    def fun(a, b, p):
        pool = [a, b, p["u"], p["v"]]
        for name, i, j in steps:
            x, y = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
            pool.append(ALL[name](x, y))
        return tuple(pool[-1 - k % len(pool)] for k in results)

    return fun


def inputs(seed):
    r = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(r.uniform(-1.5, 1.5, shape), jnp.float32)
    return draw(2), draw(), {"u": draw(2), "v": draw()}


def fates(flow):
    """The row of each leaf."""
    return {
        leaf: row
        for leaf in LEAVES
        for row in flow.inputs
        if leaf == row.path or leaf.startswith(row.path + "/")
    }


def jacobian(fun, args):
    """For each output the gradients of all leaves, without compiling anything."""
    with jax.disable_jit():
        out, pull = jax.vjp(fun, *args)
        for k, y in enumerate(out):
            cts = [jnp.zeros_like(z) for z in out]
            cts[k] = f32(0.7, 1.6) if y.shape else f32(1.3)[0]
            a, b, p = pull(tuple(cts))
            yield dict(zip(LEAVES, (a, b, p["u"], p["v"]), strict=True))


def connected(fun, args):
    """For each output and leaf, whether `gradients` is not None; nothing is run."""
    none = {}
    count = len(jax.eval_shape(fun, *args))

    def traced(*args):
        for k in range(count):
            found = sg.gradients(fun, list(LEAVES), ys=f"return/{k}")(*args)
            none[k] = dict(zip(LEAVES, (g is not None for g in found), strict=True))

    jax.eval_shape(traced, *args)
    return none


@given(programs(CHEAP), st.integers(0, 1 << 30))
@examples(0.35)
def test_what_is_cut_or_unused_is_zero(program, seed):
    fun, args = build(program), inputs(seed)
    rows = fates(sg.flow(fun)(*args))
    for k, grads in enumerate(jacobian(fun, args)):
        for leaf, grad in grads.items():
            row = rows[leaf]
            word = row.terms.get(f"return/{k}", row.status)
            if word in ZERO or row.status in ZERO:
                np.testing.assert_array_equal(grad, jnp.zeros_like(grad), err_msg=leaf)


@given(programs(set(GENERIC)), st.integers(0, 1 << 30))
@examples(0.3)
def test_what_flows_is_not_zero_at_a_generic_point(program, seed):
    fun, args = build(program), inputs(seed)
    flow = sg.flow(fun)(*args)
    total = dict.fromkeys(LEAVES, False)
    for k, grads in enumerate(jacobian(fun, args)):
        for leaf, grad in grads.items():
            total[leaf] |= bool(jnp.any(grad != 0))
            assert flow.connected(leaf, f"return/{k}") == bool(jnp.any(grad != 0))
    found = {leaf: row.status == "flows" for leaf, row in fates(flow).items()}
    assert found == total


@given(programs(set(ALL)))
@examples(0.15)
def test_flow_gradients_and_connected_agree(program):
    fun, args = build(program), inputs(0)
    flow = sg.flow(fun)(*args)
    table = connected(fun, args)
    for leaf, row in fates(flow).items():
        every = [table[k][leaf] for k in table]
        assert row.status in (("flows",) if any(every) else ZERO)
        assert flow.connected(leaf) == any(every)
        for k, expected in enumerate(every):
            one = fates(sg.flow(fun, ys=f"return/{k}")(*args))[leaf]
            assert (one.status == "flows") == expected
            assert flow.connected(leaf, f"return/{k}") == expected


HAS_OUT_NZS = hasattr(jax.vjp(jnp.sin, 1.0)[1], "out_nzs")  # JAX >= 0.11.1


@given(programs(set(ALL)))
@examples(0.1 if HAS_OUT_NZS else 0)
def test_never_coarser_than_jax(program):
    fun, args = build(program), inputs(0)
    leaves, tree = jax.tree.flatten(args)
    flow, seen = sg.flow(fun)(*args), []

    def one(k):
        return lambda x: fun(*tree.unflatten([*leaves[:k], x, *leaves[k + 1 :]]))

    for k, leaf in enumerate(LEAVES):
        jax.eval_shape(lambda x, k=k: seen.append(jax.vjp(one(k), x)[1]), leaves[k])
        for output, there in enumerate(getattr(seen[k], "out_nzs", ())):
            assert there or not flow.connected(leaf, f"return/{output}")


@given(st.tuples(*[programs(CHEAP)] * 3))
@examples(0.1)
def test_cells_of_named_terms(parts):
    first, second, third = map(build, parts)

    def loss(a, b, p):
        one = sg.name(jnp.sum(first(a, b, p)[0]), "one")
        two = sg.name(jnp.sum(second(a, b, p)[0]), "two")
        three = sg.name(jnp.sum(third(a, b, p)[0]), "three")
        return one + two + three

    def terms(a, b, p):
        values = [jnp.sum(part(a, b, p)[0]) for part in (first, second, third)]
        return dict(zip(("one", "two", "three"), values, strict=True))

    args = inputs(0)
    flow, apart = sg.flow(loss)(*args), sg.flow(terms)(*args)
    names = ("one", "two", "three")
    flowing = {
        n for n in names if any(apart.connected(x, f"return/{n}") for x in LEAVES)
    }
    rows, expected = fates(flow), fates(apart)
    used = {
        n
        for n in names
        if any(expected[x].terms[f"return/{n}"] != "unused" for x in LEAVES)
    }
    if len(used) < 2 or not flowing:  # a single one may be a sum itself, of its parts
        assert not set(flow.terms) & set(names)
        return
    assert set(flow.terms) == used
    for leaf in LEAVES:
        for name in flow.terms:
            assert rows[leaf].terms[name] == expected[leaf].terms[f"return/{name}"]


@pytest.mark.parametrize("name", ALL)
def test_each_operation_alone(name):
    fun, args = build(([(name, 3, 2)], [0])), inputs(1)  # x is a, y is b
    rows, grads = fates(sg.flow(fun)(*args)), next(jacobian(fun, args))
    for leaf, grad in grads.items():
        if rows[leaf].status in ZERO:
            assert not jnp.any(grad), leaf
        elif name in GENERIC:
            assert jnp.any(grad != 0), leaf
