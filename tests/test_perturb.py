"""A perturbation that is not zero is added, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import instructions

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


def cube(x):
    return sg.name(x**2, "h") ** 3


P = sg.perturb(cube, "h")
# (x**2 + d)**3 at x = 2, d = 1: 125; by d: 75; by x: 3 * 25 * 4 = 300; by d twice: 30
X, D = jnp.float32(2.0), {"h": jnp.float32(1.0)}


def test_values_and_derivatives(run):
    assert run(P)(D, X) == 125.0
    assert run(jax.grad(P))(D, X)["h"] == 75.0
    assert run(jax.grad(P, 1))(D, X) == 300.0
    assert run(jax.jacfwd(P))(D, X)["h"] == 75.0
    assert run(jax.hessian(P))(D, X)["h"]["h"] == 30.0
    assert run(jax.grad(lambda x: jax.grad(P)(D, x)["h"]))(X) == 30.0 * 4.0
    by_d = run(lambda d: P({"h": d}, X))
    assert jax.jvp(by_d, (D["h"],), (jnp.float32(2.0),))[1] == 150.0


def test_many_at_once(run):
    ds = jnp.array([0.0, 1.0, -1.0])
    values = run(jax.vmap(lambda d: P({"h": d}, X)))(ds)
    np.testing.assert_array_equal(values, [64.0, 125.0, 27.0])
    slopes = run(jax.vmap(jax.grad(lambda d: P({"h": d}, X))))(ds)
    np.testing.assert_array_equal(slopes, [48.0, 75.0, 27.0])
    mapped = run(jax.vmap(P, (None, 0)))(D, jnp.array([2.0, 1.0]))
    np.testing.assert_array_equal(mapped, [125.0, 8.0])


def test_in_loops_and_branches(run):
    def scanned(x):
        step = lambda c, _: (sg.name(c * 2.0, "h"), None)
        return jax.lax.scan(step, x, None, length=3)[0]

    def branched(x):
        return jax.lax.cond(x > 0, lambda x: sg.name(2 * x, "h"), lambda x: x, x)

    d = jnp.array([1.0, 0.5, 0.25])  # ((2x + 1) 2 + 0.5) 2 + 0.25
    assert run(sg.perturb(scanned, "h"))({"h": d}, X) == 8 * X + 4 + 1 + 0.25
    slopes = run(jax.grad(sg.perturb(scanned, "h")))({"h": d}, X)["h"]
    np.testing.assert_array_equal(slopes, [4.0, 2.0, 1.0])
    assert run(sg.perturb(branched, "h"))(D, X) == 5.0
    assert run(sg.perturb(branched, "h"))(D, -X) == -2.0
    remat = sg.perturb(jax.checkpoint(cube), "h")
    assert run(jax.grad(remat))(D, X)["h"] == 75.0


def test_arguments_and_outputs(run):
    f = sg.perturb(lambda x, y: {"out": x * y}, ["x", "return/out"])
    out = run(f)({"x": 1.0, "return/out": 10.0}, 2.0, 3.0)
    assert out["out"] == (2.0 + 1.0) * 3.0 + 10.0


def test_a_known_zero_changes_no_bit():
    f = sg.perturb(lambda x: sg.name(x, "h"), "h")
    for x in (jnp.float32(-0.0), jnp.float32(jnp.inf), jnp.float32(jnp.nan)):
        out = f({"h": 0.0}, x)
        assert np.asarray(out).tobytes() == np.asarray(x).tobytes()
        value, _ = jax.value_and_grad(lambda d, x=x: f({"h": d}, x))(jnp.float32(0.0))
        assert np.asarray(value).tobytes() == np.asarray(x).tobytes()


def test_a_known_zero_leaves_no_instruction():
    def by_hand(x):
        return 3 * (x**2) ** 2

    def perturbed(x):
        return jax.grad(P)({"h": 0.0}, x)["h"]

    assert instructions(perturbed, X) == instructions(by_hand, X)
    plain = instructions(lambda x: (x**2) ** 3, X)
    assert instructions(lambda x: P({"h": 0.0}, x), X) == plain
    assert instructions(lambda x: P({"h": jnp.zeros(())}, x), X) == plain


# A tree that holds a key ------------------------------------------------------------

KEYS = {
    "key": lambda: jax.random.key(0),
    "keys": lambda: jax.random.split(jax.random.key(1), 3),
    "rbg": lambda: jax.random.key(2, impl="rbg"),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("at", ["p", "h", sg.point("h")], ids=str)
def test_a_key_stays_as_it_is(at, key, run):
    tree = {"w": jnp.float32([1.0, 2.0]), "k": key(), "n": jnp.int32(2)}
    zeros = jax.tree.map(jnp.zeros_like, tree)

    def noisy(p):
        p = sg.name(p, "h")
        first = p["k"].ravel()[0]
        return jnp.sum(p["w"] ** p["n"]) + jax.random.normal(first)

    perturbed = sg.perturb(noisy, at)
    noise = jax.random.normal(tree["k"].ravel()[0])

    def moved(w):
        return perturbed({at: {**zeros, "w": w}}, tree) - noise

    # sum((w + d) ** 2) at w = (1, 2), by d: 2 (w + d)
    np.testing.assert_allclose(run(moved)(zeros["w"]), 5.0, rtol=1e-5)
    np.testing.assert_allclose(run(moved)(jnp.float32([1.0, 0.0])), 8.0, rtol=1e-5)
    np.testing.assert_allclose(run(jax.grad(moved))(zeros["w"]), [2.0, 4.0])
    assert run(perturbed)({at: zeros}, tree) == run(noisy)(tree)


def test_a_key_that_is_returned_stays_as_it_is():
    tree = {"w": jnp.float32(1.0), "k": jax.random.key(3)}
    d = {"w": jnp.float32(0.5), "k": jnp.zeros_like(tree["k"])}
    out = sg.perturb(lambda p: p, "return")({"return": d}, tree)
    assert out["w"] == 1.5
    assert out["k"] == tree["k"]


@pytest.mark.parametrize("at", ["k", "return/k"])
def test_nothing_can_be_added_to_a_key(at):
    key = jax.random.key(0)
    f = lambda k: {"k": k, "x": jax.random.normal(k)}
    with pytest.raises(TypeError, match=r"PRNG key[\s\S]*write: .*sg\.edit"):
        sg.perturb(f, at)({at: jax.random.key(7)}, key)
    assert sg.perturb(f, at)({at: jnp.zeros_like(key)}, key)["x"] == f(key)["x"]
