"""Gates and rules of a whole tree: each entry is of its own operands alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
A, B, X = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4), f32(1.2, 0.6, -0.9)
P = {"a": A, "b": B}


def twice(tree):
    return {k: 2 * v for k, v in tree.items()}


by_vjp = jax.custom_vjp(twice)
by_vjp.defvjp(lambda p: (twice(p), None), lambda _, cts: (twice(cts),))
by_jvp = jax.custom_jvp(twice)
by_jvp.defjvp(lambda primals, tangents: (by_jvp(*primals), by_jvp(*tangents)))


def clipped(ct, out, tree):
    return (optax.clip_by_global_norm(1.0).update(ct, None)[0],)


def sines(tree):
    return jax.tree.map(jnp.sin, tree)


def by_its_entries(ct, out, tree):
    return (jax.tree.map(lambda c, x: c * jnp.cos(x), ct, tree),)


# Each takes a tree and hands each entry on as it is, or a function of it.
WHOLE = {
    "clip_gradient_norm": lambda p: sg.clip_gradient_norm(p, 1.0),
    "clip by optax": lambda p: sg.transform_gradient(p, optax.clip_by_global_norm(1.0)),
    "own clip": sg.with_backward(lambda p: p, clipped),
    "own backward": sg.with_backward(
        lambda p: jax.tree.map(jnp.sin, p), by_its_entries
    ),
    "custom_vjp": by_vjp,
    "custom_jvp": by_jvp,
    "vmap of a clip": jax.vmap(lambda p: sg.clip_gradient_norm(p, 1.0)),
    "vmap of a rule": jax.vmap(by_vjp),
    "clip in jit": jax.jit(lambda p: sg.clip_gradient_norm(p, 1.0)),
    "rule in remat": jax.checkpoint(by_vjp),
}

# Losses of what a function makes of a tree, and how `a` and `b` fare without it.
LOSSES = {
    "a alone": (lambda g, p: jnp.sum(g(p)["a"] * X), ["flows", "unused"]),
    "b alone": (lambda g, p: jnp.sum(g(p)["b"] ** 2), ["unused", "flows"]),
    "a stopped": (
        lambda g, p: jnp.sum(lax.stop_gradient(g(p)["a"]) * g(p)["b"]),
        ["cut", "flows"],
    ),
    "a stopped and b unread": (
        lambda g, p: jnp.sum(lax.stop_gradient(g(p)["a"])) + jnp.sum(X),
        ["cut", "unused"],
    ),
    "a rounded before": (
        lambda g, p: jnp.sum(g({"a": jnp.round(p["a"]), "b": p["b"]})["a"]),
        ["cut", "unused"],
    ),
    "b made of a": (
        lambda g, p: jnp.sum(g({"a": X, "b": p["b"] * lax.stop_gradient(p["a"])})["b"]),
        ["cut", "flows"],
    ),
    "scan of a": (
        lambda g, p: jnp.sum(lax.scan(lambda c, _: (g(c), None), p, None, 3)[0]["a"]),
        ["flows", "unused"],
    ),
    "scan that mixes": (
        lambda g, p: jnp.sum(
            lax.scan(
                lambda c, _: (g({"a": c["a"] * c["b"], "b": c["b"]}), None), p, None, 2
            )[0]["a"]
        ),
        ["flows", "flows"],
    ),
}


def moves(f, *args):
    """Tell for each array whether its gradient is anything but zeros."""
    grads = jax.grad(f, tuple(range(len(args))))(*args)
    return [bool(np.any(g)) for g in jax.tree.leaves(grads)]


def statuses(f, *args, names="ab"):
    """Return the word for each array, folded rows spelled out."""
    words = {row.path: row.status for row in sg.flow(f)(*args).inputs}
    return [words.get(n, words.get(f"p/{n}", words.get("p"))) for n in names]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("whole", WHOLE)
def test_each_entry_fares_as_without_the_rule(whole, loss):
    function, wanted = LOSSES[loss]

    def f(p):
        return function(WHOLE[whole], p)

    def plain(p):
        return function(twice, p)

    assert statuses(plain, P) == wanted
    assert statuses(f, P) == wanted
    assert moves(f, P) == [word == "flows" for word in wanted]
    reasons = [cut.reason for cut in sg.flow(f)(P).cuts]
    assert reasons == [cut.reason for cut in sg.flow(plain)(P).cuts]


# What is said of a leaf that nobody reads ---------------------------------------------


def two_terms(whole):
    def loss(p, x):
        p = whole(p)
        rec = jnp.mean((x @ p["a"]) ** 2)
        reg = jnp.sum(p["b"] ** 2)
        return rec + reg

    return loss


@pytest.mark.parametrize("whole", WHOLE)
def test_a_term_does_not_read_what_another_one_does(whole):
    loss, x = two_terms(WHOLE[whole]), jnp.stack([X, A])
    flow = sg.flow(loss, xs="p")(P, x)
    rows = [line.split() for line in str(flow).splitlines()]
    assert not flow.cuts
    assert ["p/a", "3", "flows", "flows", "unused"] in rows
    assert ["p/b", "3", "flows", "unused", "flows"] in rows
    with pytest.raises(AssertionError, match="rec is not computed from it") as caught:
        sg.assert_gradient(loss, "p/b", ys=sg.var("rec"))(P, x)
    assert "on purpose" not in str(caught.value)
    assert "returns" not in str(caught.value).replace("jax.grad returns", "")
    sg.assert_gradient(loss, "p/b", ys=sg.var("reg"))(P, x)


@pytest.mark.parametrize("whole", WHOLE)
def test_a_leaf_that_nobody_reads_is_told_to_be_that(whole):
    def loss(p):
        return jnp.sum(WHOLE[whole](p)["a"] ** 2)

    assert "not computed from it" in str(sg.flow(loss)(P).explain("p/b"))
    with pytest.raises(ValueError, match="p/b: no y is computed") as caught:
        sg.gradients(loss, "p", unconnected_gradients="error")(P)
    assert "on purpose" not in str(caught.value)
    found = sg.gradient_stats(loss, ["p/b"])(P)
    assert found["p/b"].cause == "no y is computed from it"


# What a gate or rule does with a leaf counts ------------------------------------------

mixed = sg.with_backward(
    lambda p: p, lambda ct, out, p: ({"a": ct["a"] + ct["b"], "b": ct["b"]},)
)


def test_a_backward_that_mixes_hands_a_gradient_to_what_is_not_read():
    reads_b = lambda p: jnp.sum(mixed(p)["b"])
    reads_a = lambda p: jnp.sum(mixed(p)["a"])
    assert statuses(reads_b, P) == ["flows", "flows"]
    assert moves(reads_b, P) == [True, True]
    assert statuses(reads_a, P) == ["flows", "unused"]
    assert moves(reads_a, P) == [True, False]


@jax.custom_vjp
def scaled(x, s):
    return x, 2 * x


scaled.defvjp(
    lambda x, s: (scaled(x, s), s), lambda s, ct: ((ct[0] + 2 * ct[1]) * s, None)
)


@jax.custom_vjp
def ignores(x, s):
    return x


ignores.defvjp(lambda x, s: (x, s), lambda s, ct: (ct, jnp.zeros_like(s)))


@jax.custom_vjp
def surrogate(x, s):
    return jnp.round(x)


surrogate.defvjp(lambda x, s: (jnp.round(x), None), lambda _, ct: (ct, ct))
half_left_out = sg.with_backward(
    lambda x, y: (x * 2, x + y), lambda ct, out, x, y: (ct[0] * 2 + ct[1], None)
)

USES = {
    "limit of a clip": (
        lambda a, b: jnp.sum(sg.clip_gradient_norm((a, a**2), b[0] + 1.0)[0]),
        ["flows", "cut"],
    ),
    "factor of a rule": (lambda a, b: jnp.sum(scaled(a, b)[1]), ["flows", "cut"]),
    "never read": (lambda a, b: jnp.sum(ignores(a, b)), ["flows", "unused"]),
    "given by the rule": (lambda a, b: jnp.sum(surrogate(a, b)), ["flows", "flows"]),
    "left out": (lambda a, b: jnp.sum(half_left_out(a, b)[1]), ["flows", "cut"]),
    "left out, unread": (
        lambda a, b: jnp.sum(half_left_out(a, b)[0]),
        ["flows", "unused"],
    ),
}


@pytest.mark.parametrize("use", USES)
def test_what_a_rule_reads_counts_for_those_results_that_it_is_read_for(use):
    function, wanted = USES[use]
    assert statuses(function, A, B) == wanted
    assert moves(function, A, B) == [word == "flows" for word in wanted]


def cell(h, x):
    return jnp.tanh(h), h * x


recurrent = jax.custom_vjp(cell)
recurrent.defvjp(
    lambda h, x: (cell(h, x), (h, x)),
    lambda hx, ct: (
        ct[0] * (1 - jnp.tanh(hx[0]) ** 2) + ct[1] * hx[1],
        ct[1] * hx[0],
    ),
)


@pytest.mark.parametrize("function", [cell, recurrent])
@pytest.mark.parametrize("which", [0, 1])
def test_a_recurrent_cell_of_which_one_result_is_read(function, which):
    def f(a, b):
        return jnp.sum(lax.scan(lambda h, _: function(h, b), a, None, 3)[which])

    wanted = ["flows", ("unused", "flows")[which]]
    assert statuses(f, A, B) == wanted
    assert moves(f, A, B) == [True, bool(which)]
