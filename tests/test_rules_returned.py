"""Backward functions that are not linear in what comes to them.

One may return a number whatever comes, as those do by which a loss is added to a value
on the way (the auxiliary losses of mixtures of experts), or use what comes only through
a comparison, a rounding or a count. `jax.grad` of the same function is the measure.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg
from stopgrad_jax.train import make_step

pytestmark = pytest.mark.usefixtures("usual_settings")
V, W = f32(0.3, 1.2, -0.8), f32(2.0, -0.5, 0.7)
stop = lax.stop_gradient


def by_custom_vjp():
    f = jax.custom_vjp(lambda out, aux: out)
    f.defvjp(lambda o, a: (o, None), lambda _, ct: (ct, jnp.float32(0.01)))
    return f


def by_with_backward():
    rule = lambda ct, out, o, a: (ct, jnp.float32(0.01))
    return sg.with_backward(lambda o, a: o, rule)


ADDED = {"custom_vjp": by_custom_vjp, "with_backward": by_with_backward}


def agreed(fun, args):
    """Hold all verbs to `jax.grad`; return the statuses of the inputs."""
    flow = sg.flow(fun)(*args)
    for k, row in enumerate(flow.inputs):
        found, truth = sg.gradients(fun, row.path)(*args), jax.grad(fun, k)(*args)
        if row.status == "flows":
            np.testing.assert_allclose(found, truth, rtol=1e-5)
            sg.assert_gradient(fun, row.path)(*args)
            with pytest.raises(AssertionError):
                sg.assert_no_gradient(fun, row.path)(*args)
            first = str(flow.explain(row.path)).split("\n")[0]
            assert "can get a gradient" in first or "connected; may be zero" in first
            norm = sg.gradient_stats(fun, row.path)(*args)[row.path].norm
            np.testing.assert_allclose(norm, jnp.linalg.norm(truth), rtol=1e-4)
        else:
            assert found is None
            assert not np.any(truth)
            sg.assert_no_gradient(fun, row.path)(*args)
            with pytest.raises(AssertionError):
                sg.assert_gradient(fun, row.path)(*args)
    return [row.status for row in flow.inputs]


# What is returned whatever comes ------------------------------------------------------


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(
    "case",
    ["plain", "scan", "vmap", "jit", "remat", "by zero", "stopped beside", "constant"],
)
def test_a_loss_that_is_added_on_the_way(added, case):
    add = ADDED[added]()
    cases = {
        "plain": lambda w, r: add(w**2, r**2),
        "scan": lambda w, r: lax.scan(
            lambda c, _: (add(c * 2, r**2), None), w, None, length=2
        )[0],
        "vmap": lambda w, r: jnp.sum(
            jax.vmap(lambda k: add(k * w, r**2))(jnp.arange(1.0, 3.0))
        ),
        "jit": lambda w, r: jax.jit(add)(w, r**2) * w,
        "remat": lambda w, r: jax.checkpoint(lambda w, r: add(w, r**2))(w, r) * w,
        "by zero": lambda w, r: 0.0 * add(w, r**2) + w,
        "stopped beside": lambda w, r: add(stop(w), r**2) * w,
        "constant": lambda w, r: add(3.0, r) * w,
    }
    fun = cases[case]
    assert jax.grad(fun, 1)(3.0, 3.0) >= 0.01
    assert agreed(fun, (3.0, 3.0)) == ["flows", "flows"]


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("case", ["unused", "stopped", "rounded", "other result"])
def test_it_is_not_added_where_nothing_comes(added, case):
    """JAX does not run a backward function if no cotangent comes to it at all."""
    add = ADDED[added]()
    fun = {
        "unused": lambda w, r: (add(w, r**2), w)[1],
        "stopped": lambda w, r: stop(add(w, r**2)) + w,
        "rounded": lambda w, r: jnp.round(add(w, r**2)) + w,
        "other result": lambda w, r: jax.jit(lambda w, r: (add(w, r**2), w))(w, r)[1],
    }[case]
    ends = "cut" if case in ("stopped", "rounded") else "unused"
    assert agreed(fun, (3.0, 3.0)) == ["flows", ends]


@pytest.mark.parametrize("added", ADDED)
def test_the_ways_of_one_function_add_up(added):
    add = ADDED[added]()
    f = lambda w: add(sg.name(w**2, "h"), sg.name(w**3, "k"))
    by = lambda **stops: sg.gradients(f, "w", **stops)(2.0)
    np.testing.assert_allclose(by(), jax.grad(f)(2.0))
    np.testing.assert_allclose(by(stop_gradients="k"), 4.0)
    np.testing.assert_allclose(by(stop_gradients="h"), 0.01 * 12)
    assert by(stop_gradients=["h", "k"]) is None
    found = sg.gradients(f, ["h", "k"])(2.0)
    np.testing.assert_allclose(found, [1.0, 0.01])


@pytest.mark.parametrize("added", ADDED)
def test_what_it_is_added_to_is_trained(added):
    add = ADDED[added]()
    loss = lambda params, batch: add(params["w"] * batch, params["r"] ** 2)
    params = {"w": jnp.float32(1.0), "r": jnp.float32(3.0)}
    step = make_step(loss, optax.sgd(1.0), untrained="error")
    state, _ = step(step.init(params), jnp.float32(2.0))
    np.testing.assert_allclose(state.params["r"], 3.0 - 0.06, rtol=1e-6)


@pytest.mark.parametrize(("used", "truth"), [(0, [1, 0]), (1, [1, 1]), (2, [1, 1])])
def test_a_part_that_is_added_beside_what_comes(used, truth):
    """Of two results: what the rule adds to one's cotangent, it adds to a zero."""

    f = jax.custom_vjp(lambda a, b: (a * 2, b * 3))
    f.defvjp(lambda a, b: (f(a, b), a), lambda a, ct: (ct[0] + 0.1 * a, ct[1] * a * a))

    def fun(a, b):
        first, second = f(a, b)
        return jnp.sum((first, second, first * second)[used])

    statuses = ["flows" if flows else "unused" for flows in truth]
    assert [np.any(jax.grad(fun, k)(V, W)) for k in (0, 1)] == list(map(bool, truth))
    flow = sg.flow(fun)(V, W)
    assert [row.status for row in flow.inputs] in (statuses, ["flows", "cut"])
    for k, flows in enumerate(truth):
        found = sg.gradients(fun, "ab"[k])(V, W)
        assert (found is not None) == bool(flows)
        if flows:
            np.testing.assert_allclose(found, jax.grad(fun, k)(V, W), rtol=1e-6)


ZEROS = {
    "zeros_like": jnp.zeros_like,
    "zeros": lambda ct: jnp.zeros(3),
    "none": lambda ct: None,
    "literal": lambda ct: jnp.full(3, 0.0),
    "times": lambda ct: jnp.zeros(3) * W,
    "where": lambda ct: jnp.where(W > 0, jnp.zeros(3), 0.0),
    "sum": lambda ct: jnp.zeros(3) + jnp.sin(jnp.zeros(3)) @ jnp.outer(W, W),
    "scan": lambda ct: lax.scan(lambda c, w: (c * w, c), 0.0, W)[1],
    "cond": lambda ct: lax.cond(W[0] > 0, jnp.zeros_like, lambda x: x * 0.0, W),
}


OF_ZEROS = {
    "tanh": lambda z: jax.grad(lambda v: jnp.sum(jnp.tanh(v)))(z),  # 1 - tanh(z)**2
    "cos": jnp.cos,
    "logistic": jax.nn.sigmoid,
    "erfc": jax.scipy.special.erfc,
    "sorted": lambda z: jnp.where(jnp.searchsorted(z, z, side="right") > 0, 1.0, 0.0),
    "not": lambda z: (~(z > 0)).astype(z.dtype),
    "top_k": lambda z: lax.top_k(z, 3)[1].astype(z.dtype),
}


@pytest.mark.parametrize("of", OF_ZEROS)
def test_what_is_made_of_zeros_may_be_more(of):
    """Whatever JAX's operation makes of them is what it is, by the operation itself."""
    f = jax.custom_vjp(lambda a, b: a * b)
    made = OF_ZEROS[of]
    f.defvjp(lambda a, b: (f(a, b), a), lambda a, ct: (made(jnp.zeros(3)), ct * a))
    assert np.any(made(jnp.zeros(3)))
    assert agreed(lambda a, b: jnp.sum(f(a, b)), (V, W)) == ["flows", "flows"]


@pytest.mark.parametrize("kind", ["custom_vjp", "with_backward"])
@pytest.mark.parametrize("zero", ZEROS)
def test_a_zero_is_none(kind, zero):
    product = lambda a, b: a * b
    rule = ZEROS[zero]
    if kind == "custom_vjp":
        f = jax.custom_vjp(product)
        f.defvjp(lambda a, b: (f(a, b), a), lambda a, ct: (rule(ct), ct * a))
    else:
        f = sg.with_backward(product, lambda ct, out, a, b: (rule(ct), ct * a))
    assert agreed(lambda a, b: jnp.sum(f(a, b)), (V, W)) == ["cut", "flows"]


# What uses what comes, but not its value ----------------------------------------------

LEVELS = jnp.linspace(-3.0, 3.0, 8)


@jax.jit
def to_int8(ct):
    return jnp.round(ct * 64).astype(jnp.int8)


positive = jax.jit(lambda ct: ct > 0)


def counted(ct):
    size = jnp.sum(jnp.abs(ct))
    return jnp.full(3, lax.while_loop(lambda k: k < size, lambda k: k + 1, 0.0))


def halved(ct):
    state = lax.while_loop(
        lambda c: jnp.sum(c[1]) > 0.1, lambda c: (c[0] + 1, abs(c[1]) / 2), (1.0, ct)
    )
    return jnp.full(3, state[0])


DECIDING = {
    "int8": lambda ct: to_int8(ct).astype(jnp.float32) / 64,
    "searchsorted": lambda ct: LEVELS[jnp.searchsorted(LEVELS, ct)],
    "digitize": lambda ct: jnp.digitize(ct, LEVELS).astype(jnp.float32),
    "argsort": lambda ct: (jnp.argsort(ct) == 0).astype(jnp.float32),
    "isclose": lambda ct: 1 - jnp.isclose(ct, 1.0).astype(jnp.float32) * 2,
    "where": lambda ct: jnp.where(positive(ct), 1.0, -1.0),
    "checkpoint": lambda ct: jnp.where(jax.checkpoint(positive)(ct), 1.0, -1.0),
    "scan": lambda ct: jnp.where(
        lax.scan(lambda c, x: (c, x > 0), 0, ct)[1], 1.0, -1.0
    ),
    "cond": lambda ct: lax.cond(ct[0] > 0, lambda: W, lambda: -W),
    "while": counted,
    "while carried": halved,
    "bernoulli": lambda ct: jax.random.bernoulli(
        jax.random.key(0), jnp.clip(ct * 9, 0.6, 1.0)
    ).astype(jnp.float32),
}


@pytest.mark.parametrize("deciding", DECIDING)
@pytest.mark.parametrize("kind", ["custom_vjp", "with_backward", "transform", "scan"])
def test_a_rule_that_decides_by_what_comes(kind, deciding):
    rule = DECIDING[deciding]
    if kind == "custom_vjp":
        f = jax.custom_vjp(lambda x: x)
        f.defvjp(lambda x: (x, None), lambda _, ct: (rule(ct),))
    elif kind == "with_backward":
        f = sg.with_backward(lambda x: x * 1, lambda ct, out, x: (rule(ct),))
    else:
        f = lambda x: sg.transform_gradient(x, rule)
    if kind == "scan":
        one = f
        f = lambda x: lax.scan(lambda c, _: (one(c) * 0.9, None), x, None, length=2)[0]
    fun = lambda x: jnp.sum(f(x) ** 2)
    assert np.any(jax.grad(fun)(V))
    assert agreed(fun, (V,)) == ["flows"]


# Of two arrays together, one gets nothing ---------------------------------------------


def joint(rule):
    def each(cts):
        size = sum(jnp.sum(ct**2) for ct in cts)
        return tuple(rule(ct, size) for ct in cts)

    return lambda x, y: sg.transform_gradient((x, y), each)


WITHIN = {
    "clip_gradient_norm": lambda x, y: sg.clip_gradient_norm((x, y), 0.1),
    "factor": joint(lambda ct, size: ct * jnp.minimum(1.0, 0.1 / jnp.sqrt(size + 1))),
    "divided": joint(lambda ct, size: ct / jnp.maximum(jnp.sqrt(size), 1e-6)),
    "clipped": joint(lambda ct, size: jnp.clip(ct, -1, 1) * size),
    "nan_to_num": joint(lambda ct, size: jnp.nan_to_num(ct) * size),
    "where": joint(lambda ct, size: jnp.where(jnp.abs(ct) * size > 0.1, ct, 0)),
    "updated": joint(lambda ct, size: ct.at[0].set(0.0) + jnp.roll(ct, 1) * size),
    "product": joint(lambda ct, size: jnp.outer(V, W) @ ct / (1 + size)),
    "loop": joint(lambda ct, size: lax.fori_loop(0, 2, lambda _, c: c * W + c, ct)),
    "branch": joint(lambda ct, size: lax.cond(size > 1, lambda c: c / 2, jnp.sin, ct)),
    "halved": joint(
        lambda ct, size: lax.while_loop(lambda c: c @ c > 0.1, lambda c: c / 2, ct)
    ),
    "optax": lambda x, y: sg.transform_gradient((x, y), optax.clip_by_global_norm(0.1)),
}
USES = {
    "stopped": (lambda a, b: a * stop(b), [1, 0]),
    "unused": (lambda a, b: a, [1, 0]),
    "the second": (lambda a, b: 2 * b, [0, 1]),
    "both": (lambda a, b: a * b, [1, 1]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("gate", WITHIN)
def test_an_array_to_which_nothing_comes_gets_nothing(gate, use):
    gated, (used, truth) = WITHIN[gate], USES[use]
    fun = lambda x, y: jnp.sum(used(*gated(x, y)))
    assert [np.any(jax.grad(fun, k)(V, W)) for k in (0, 1)] == list(map(bool, truth))
    flow = sg.flow(fun)(V, W)
    assert [row.status == "flows" for row in flow.inputs] == list(map(bool, truth))
    for k, name in enumerate("xy"):
        check = sg.assert_gradient if truth[k] else sg.assert_no_gradient
        check(fun, name)(V, W)
        assert (sg.gradients(fun, name)(V, W) is not None) == bool(truth[k])


MIXING = {
    "swap": (lambda cts: (cts[1], cts[0]), [0, 1]),
    "sum": (lambda cts: (cts[0], cts[0] + cts[1]), [1, 1]),
    "cosine": (lambda cts: (cts[0], jnp.cos(cts[1])), [1, 1]),
    "decay": (lambda cts: (cts[0], cts[1] + 0.1 * W), [1, 1]),
    "sign": (lambda cts: (cts[0], jnp.where(cts[1] > 0, 1.0, -1.0)), [1, 1]),
    "zeros": (lambda cts: (cts[0], jnp.zeros_like(cts[1])), [1, 0]),
    "size": (lambda cts: (cts[0], jnp.full(3, cts[0] @ cts[0]) - cts[1]), [1, 1]),
}


@pytest.mark.parametrize("mixing", MIXING)
def test_an_array_to_which_the_other_one_s_comes_gets_it(mixing):
    rule, truth = MIXING[mixing]
    fun = lambda x, y: jnp.sum(sg.transform_gradient((x, y), rule)[0])
    assert [np.any(jax.grad(fun, k)(V, W)) for k in (0, 1)] == list(map(bool, truth))
    flow = sg.flow(fun)(V, W)
    assert [row.status == "flows" for row in flow.inputs] == list(map(bool, truth))
    for k, name in enumerate("xy"):
        found = sg.gradients(fun, name)(V, W)
        assert (found is not None) == bool(truth[k])
        if truth[k]:
            np.testing.assert_allclose(found, jax.grad(fun, k)(V, W), rtol=1e-6)


def test_a_comparison_in_a_call_is_no_linear_part():
    """A sum is told by its parts only where it is linear in them."""
    picked = jax.jit(lambda x: jnp.where(jax.jit(lambda x: x > 0)(x), x, 2 * x))
    fun = lambda x: jnp.sum(picked(x))
    assert agreed(fun, (V,)) == ["flows"]
