"""A name in every way of holding a function inside another, by every verb.

Expected numbers are plain JAX's: of the same composition, with a perturbation by hand.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nested_cases import (
    LOOPS,
    RULES,
    WRAPPERS,
    as_verbs_lay_it_out,
    by_hand,
    composed,
    edited,
    named,
    shape_by_hand,
)

import stopgrad_jax as sg

W, X = jnp.float32(0.7), jnp.linspace(-0.8, 0.9, 8, dtype=jnp.float32)

# What JAX itself cannot trace, cannot compile the derivative of, or differentiates
# wrongly: a shard_map without check_vma in one with it.
DEVICES = ("shard_map", "unchecked", "pmap")
UNTRACEABLE = {(a, b) for a in DEVICES for b in DEVICES if "pmap" in (a, b)}
NO_DERIVATIVE = {("shard_map", "shard_map"), ("shard_map", "unchecked")}
PAIRS = [(o, i) for o in WRAPPERS for i in WRAPPERS if (o, i) not in UNTRACEABLE]

if jax.config.jax_check_tracer_leaks:
    # Plain jit(grad(shard_map(f))) counts as a leak (tests/test_jax.py), and rules
    # that are made of closures do.
    PAIRS = [pair for pair in PAIRS if not set(pair) & {*DEVICES, *RULES}]


def losses(outer, inner):
    """Return the loss with a name, and by hand: (loss, value) of (w, x, d)."""
    f, g = composed(named, outer, inner), composed(by_hand, outer, inner)

    def hand(w, x, d):
        y, aux = g(w, x, d)
        return jnp.sum(y**2), aux

    return lambda w, x: jnp.sum(f(w, x, None)[0] ** 2), hand


def as_edited(outer, inner):
    f = composed(edited, outer, inner)
    return lambda w, x: jnp.sum(f(w, x, None)[0] ** 2)


def triple(h):
    return 3 * h


def refused(verbs, match):
    for verb in verbs:
        with pytest.raises(ValueError, match=rf"(?s){match}.*\n  got: .*\n  write: "):
            verb()


def norms(gradient, steps):
    """Return what gradient_stats is to say of a gradient that has so many axes."""
    axes = tuple(range(steps, gradient.ndim))
    size = np.abs(gradient)
    zeros = np.mean(gradient == 0, axes)
    return np.sqrt(np.sum(size**2, axes)), np.max(size, axes), zeros


def pairs(wanted):
    """Parametrize by those pairs that a predicate wants."""
    chosen = [pair for pair in PAIRS if wanted(pair)]
    ids = [f"{outer} of {inner}" for outer, inner in chosen]
    return pytest.mark.parametrize(("outer", "inner"), chosen, ids=ids)


def has_rule(pair):
    return not set(RULES).isdisjoint(pair)


def is_free(pair):
    return not has_rule(pair) and "while" not in pair and pair not in NO_DERIVATIVE


def zeros_like_h(*pair):
    """Return zeros like "h", as it is by hand and as the verbs have it."""
    d = jnp.zeros(shape_by_hand(len(X), *pair), jnp.float32)
    return d, jnp.zeros(as_verbs_lay_it_out(d, *pair).shape, jnp.float32)


@pairs(is_free)
def test_every_verb(outer, inner):
    pair = (outer, inner)
    loss, hand = losses(*pair)
    d, zero = zeros_like_h(*pair)

    def got():
        edit = sg.edit(loss, {"h": triple})
        return (
            sg.value_and_gradients(loss, ["w", "h"])(W, X),
            sg.capture(loss, "h")(W, X)[1]["h"],
            jax.grad(sg.perturb(loss, "h"))({"h": zero}, W, X)["h"],
            jax.value_and_grad(edit)(W, X),
            sg.gradient_stats(loss, "h")(W, X)["h"],
        )

    def expected():
        both = jax.value_and_grad(hand, (0, 2), has_aux=True)(W, X, d)
        return both, jax.value_and_grad(as_edited(*pair))(W, X)

    def arranged(both, edited):
        (value, h), (dw, dh) = both
        dh = laid_out(dh, pair)
        stats = norms(dh, sum(name in LOOPS for name in pair))
        return (value, [dw, dh]), laid_out(h, pair), dh, edited, (*stats, 0 * stats[0])

    assert_same(got, expected, arranged)


def by_value(loss, zero):
    """Every verb that differentiates by "h"."""
    return [
        lambda: sg.gradients(loss, "h")(W, X),
        lambda: sg.value_and_gradients(loss, ["w", "h"])(W, X),
        lambda: sg.perturb(loss, "h")({"h": zero}, W, X),
        lambda: sg.gradient_stats(loss, "h")(W, X),
    ]


@pairs(lambda pair: "while" in pair)
def test_a_value_in_a_loop_of_unknown_length(outer, inner):
    pair = (outer, inner)
    loss, _ = losses(*pair)
    capture = lambda: sg.capture(loss, "h")(W, X)
    verbs = [*by_value(loss, jnp.zeros(())), capture]
    refused(verbs, "the number of steps must be known")
    if not has_rule(pair):  # JAX has its forward pass, and so has an edit
        edit, plain = sg.edit(loss, {"h": triple}), as_edited(*pair)
        assert_same(lambda: edit(W, X), lambda: plain(W, X))


@pairs(lambda pair: has_rule(pair) and "while" not in pair)
def test_a_value_behind_a_rule(outer, inner):
    pair = (outer, inner)
    loss, hand = losses(*pair)
    d, zero = zeros_like_h(*pair)
    edit = lambda: sg.edit(loss, {"h": triple})(W, X)
    refused([*by_value(loss, zero), edit], "must lie outside custom_jvp and custom_")
    assert_same(
        lambda: (sg.capture(loss, "h")(W, X), sg.gradients(loss, "w")(W, X)),
        lambda: (hand(W, X, d), jax.grad(loss)(W, X)),
        lambda value, slope: ((value[0], {"h": laid_out(value[1], pair)}), slope),
    )


@pairs(lambda pair: pair in NO_DERIVATIVE)
def test_a_value_where_jax_has_no_derivative(outer, inner):
    pair = (outer, inner)
    loss, hand = losses(*pair)
    d, zero = zeros_like_h(*pair)
    assert_same(
        lambda: (sg.capture(loss, "h")(W, X), sg.edit(loss, {"h": triple})(W, X)),
        lambda: (hand(W, X, d), as_edited(*pair)(W, X)),
        lambda value, edited: ((value[0], {"h": laid_out(value[1], pair)}), edited),
    )
    with pytest.raises(ValueError, match=r"cotangent type|Cannot lower|pvary"):
        jax.jit(jax.grad(lambda d: hand(W, X, d)[0]))(d)
    if inner == "unchecked":
        jitted = [jax.jit(verb) for verb in by_value(loss, zero)]
        refused(jitted, "JAX knows the axes that a value differs over in all of them")


def laid_out(x, pair):
    return as_verbs_lay_it_out(np.asarray(x), *pair)


def assert_same(got, expected, arranged=lambda *x: x):
    """Compile both together and compare, leaf by leaf."""
    found, plain = jax.jit(lambda: (got(), expected()))()
    plain = arranged(*plain) if isinstance(plain, tuple) else plain
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True)
    for a, b in pairs:
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pairs(lambda pair: True)
def test_flow_and_contracts(outer, inner):
    pair = (outer, inner)
    loss, _ = losses(*pair)
    flow = sg.flow(loss)(W, X)
    assert flow.connected("w")
    assert flow.connected("x")
    # By x JAX raises at the inner shard_map: it takes a cotangent to vary over devices.
    raises = "while" in pair or pair == ("shard_map", "unchecked")
    assert ("unknown" in str(flow)) is raises
    if raises:
        return
    assert re.match(
        r"w \(.*\): (can get a gradient|connected; may)", str(flow.explain("w"))
    )
    reached = ["w", "x"] if has_rule(pair) else ["w", "x", "h"]
    sg.assert_gradient(loss, reached)(W, X)
    stopped = lambda w, x: loss(jax.lax.stop_gradient(w), x)
    sg.assert_no_gradient(stopped, "w")(W, X)
    with pytest.raises(AssertionError, match="x: expected none, can get a gradient"):
        sg.assert_no_gradient(stopped, "x")(W, X)


# Each way once outside and once inside: these run the program operation by operation.
TURNED = [*list(WRAPPERS)[6:], *list(WRAPPERS)[:6]]
AROUND = [pair for pair in zip(WRAPPERS, TURNED, strict=True) if pair in PAIRS]


@pytest.mark.parametrize(("outer", "inner"), AROUND)
def test_a_healthy_function_is_found_healthy(outer, inner):
    loss, _ = losses(outer, inner)
    if "while" in (outer, inner):
        return sg.check_gradients(loss, modes=("fwd",))(W, X)
    assert sg.find_nonfinite(loss)(W, X) is None
    sg.check_gradients(loss)(W, X)
    return None


@pytest.mark.parametrize(("outer", "inner"), sorted(UNTRACEABLE))
def test_what_jax_itself_cannot_nest(outer, inner):
    with pytest.raises(ValueError, match="context mesh"):
        jax.eval_shape(composed(named, outer, inner), W, X, None)


def grown(x, n):
    """Double a number n times, n being known only at run time."""
    step = lambda c: (c[0] + 1, sg.name(c[1] * 2.0, "h"))
    return jax.lax.while_loop(lambda c: c[0] < n, step, (0, x))[1]


@pytest.mark.parametrize("levels", [1, 2])
def test_a_while_under_vmap_ends_for_each_example_by_itself(levels):
    every = grown
    for _ in range(levels):
        every = jax.vmap(every)
    n = np.arange(1, 7).reshape([(6,), (2, 3)][levels - 1])
    x = np.linspace(0.5, 1.5, 6, dtype="float32").reshape(n.shape)
    loss = lambda x: jnp.sum(x * every(jax.lax.stop_gradient(x), n))
    np.testing.assert_allclose(jax.grad(loss)(x), x * 2.0**n)
    # h + 1 at each of n steps: 2 (2 (2 x + 1) + 1) + 1
    added = jax.grad(sg.edit(loss, {"h": lambda h: h + 1.0}))(x)
    np.testing.assert_allclose(added, x * 2.0**n + 2.0**n - 1, rtol=1e-6)
    sg.check_gradients(loss)(x)
    sg.check_gradients(lambda x: jnp.sum(every(x, n)), modes=("fwd",))(x)
