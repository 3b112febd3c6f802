"""`sg.find_nonfinite` differentiates what `sg.gradients` does, whatever `ys` is.

The law: it finds something backward if and only if that gradient is not finite. The
gradients themselves are known in closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg


def hidden_root(x):
    h = sg.name(jnp.sqrt(x), "h")
    return x * 2.0, h * 0.0


def root_outside(x):
    h = sg.name(x * 3.0, "h")
    return jnp.sqrt(x), h


def wider(x):
    h = sg.name(jnp.ones(3) * x, "h")
    return jnp.sum(h), x


def masked(x):
    h = sg.name(jnp.sqrt(x), "h")
    safe = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, jnp.sqrt(safe), 0.0) + jax.lax.stop_gradient(h)


def in_a_scan(x):
    def body(c, k):
        c = sg.name(jnp.sqrt(c * k), "c")
        return c, jnp.log1p(c)

    return jax.lax.scan(body, x, jnp.arange(3.0))[1]


@jax.jit
def inner(x):
    return sg.name(jnp.arccos(x), "inner") * 0.0


def nested(params, x):
    w = params["w"]["deep"]
    jitted = inner(x)
    return {"a": jnp.sum(jnp.sqrt(w)), "b": jitted + jnp.sum(w)}


NESTED = ({"w": {"deep": jnp.zeros(2)}, "b": jnp.ones(2)}, 0.5)
ONE = ({"w": {"deep": jnp.ones(2)}, "b": jnp.ones(2)}, 1.0)
# function, arguments, xs, ys, the gradients' sum in closed form
CASES = [
    (hidden_root, (0.0,), "x", "h", np.inf),  # 1 / (2 sqrt(0))
    (hidden_root, (0.0,), "x", "return/0", 2.0),
    (hidden_root, (4.0,), "x", "h", 0.25),
    (hidden_root, (0.0,), "x", sg.var("h"), np.inf),
    (hidden_root, (0.0,), "x", sg.op("sqrt"), np.inf),
    (root_outside, (0.0,), "x", "h", 3.0),
    (root_outside, (0.0,), "x", sg.point("h"), 3.0),
    (root_outside, (0.0,), "x", "return/1", 3.0),
    (root_outside, (0.0,), "x", "return/0", np.inf),
    (root_outside, (0.0,), "x", "x", 1.0),
    (root_outside, (0.0,), "x", ["h", "return/0"], np.inf),
    (root_outside, (0.0,), "x", ["h", "h", "x"], 7.0),
    (wider, (1.0,), "x", "h", 3.0),
    (wider, (1.0,), "x", sg.op("mul"), 3.0),
    (masked, (0.0,), "x", "h", np.inf),
    (masked, (0.0,), "x", None, 0.0),
    (in_a_scan, (0.0,), "x", "c", np.inf),
    (nested, NESTED, "params", "params", 4.0),
    (nested, NESTED, "params/w", "return/a", np.inf),
    (nested, NESTED, "params", "return/b", 2.0),
    (nested, NESTED, "x", "inner", -1 / np.sqrt(0.75)),
    (nested, ONE, "x", "inner", -np.inf),  # -1 / sqrt(1 - x**2)
    (nested, ONE, "params", "inner", 0.0),
]


@pytest.mark.parametrize(("fun", "args", "xs", "ys", "known"), CASES)
def test_the_gradient_of_what_is_asked_for(fun, args, xs, ys, known):
    found = sg.gradients(fun, xs, ys=ys)(*args)
    leaves = jax.tree.leaves(found)
    total = sum(float(jnp.sum(leaf)) for leaf in leaves)
    if fun is not in_a_scan:  # of which only this is said: a root at zero is in it
        np.testing.assert_allclose(total, known, rtol=1e-6)
    report = sg.find_nonfinite(fun, xs, ys=ys)(*args)
    assert (report is None) == bool(np.isfinite(known))
    if report is not None:
        assert report.direction == "backward"
        assert report.expression.startswith(("jnp.sqrt", "jnp.arccos"))


def test_the_line_is_that_of_the_value_asked_for():
    def both(x, y):
        h = sg.name(jnp.sqrt(x), "h")
        k = sg.name(jnp.sqrt(y), "k")
        return jnp.stack([h, k])

    for ys, xs, line in (("h", "x", 1), ("k", "y", 2)):
        report = sg.find_nonfinite(both, ["x", "y"], ys=ys)(0.0, 0.0)
        assert report.line == both.__code__.co_firstlineno + line
        assert report.reaches == (xs,)


def test_a_guard_inside_what_is_asked_for_is_tried():
    def guarded(x):
        h = sg.name(jnp.where(x > 0, jnp.sqrt(x), 0.0), "h")
        return h, x

    report = sg.find_nonfinite(guarded, "x", ys="h")(0.0)
    assert "masks the value and not the derivative" in report.hint
    assert "jnp.sqrt(jnp.where(x > 0, x, " in report.hint


def in_a_loop(x):
    more = lambda c: c < 3.0
    return jax.lax.while_loop(more, lambda c: sg.name(c * 2.0, "h"), x)


@jax.custom_jvp
def ruled(x):
    return sg.name(x * 2.0, "h")


ruled.defjvp(lambda p, t: (ruled(*p), t[0] * 2.0))


@pytest.mark.parametrize("fun", [in_a_loop, ruled])
def test_what_gradients_refuses_is_refused_alike(fun):
    messages = []
    for verb in (sg.gradients, sg.find_nonfinite):
        with pytest.raises(ValueError, match=r"(?s)  got: .*  write: ") as caught:
            verb(fun, 0, ys="h")(f32(1.0)[0])
        messages.append(str(caught.value).partition("\n")[2])
    assert messages[0] == messages[1]


ZERO = f32(0.0)[0]


@pytest.mark.parametrize(
    ("fun", "hint"),
    [
        # 1 / 0 is inf, by IEEE 754; a remainder by zero is nan.
        (lambda x: x**-1, "divided by zero is inf"),
        (lambda x: jax.lax.integer_pow(x, -2), "divided by zero is inf"),
        (jnp.reciprocal, "divided by zero is inf"),
        (lambda x: 3.0 / x, "divided by zero is inf"),
        (lambda x: jnp.mod(x + 1.0, x), "remainder of a division by zero is nan"),
        (lambda x: jnp.fmod(x + 1.0, x), "remainder of a division by zero is nan"),
        (lambda x: jax.lax.rem(x, x), "remainder of a division by zero is nan"),
    ],
)
def test_what_is_divided_by_zero(fun, hint):
    assert not np.isfinite(fun(ZERO))
    assert hint in sg.find_nonfinite(fun, ())(ZERO).hint


def test_a_power_that_overflows_is_not_divided_by_zero():
    report = sg.find_nonfinite(lambda x: x**-3, ())(np.float32(1e-20))
    assert report.hint == "the result leaves the range of float32"


def test_a_well_conditioned_matrix_is_not_said_to_be_singular():
    def solved(a):
        return jnp.sum(jnp.linalg.solve(a * jnp.eye(2), 1e30 * jnp.ones(2)))

    hint = " ".join(sg.find_nonfinite(solved, ())(np.float32(1e-30)).hint.split())
    assert "or a solution that leaves the range of float32" in hint
