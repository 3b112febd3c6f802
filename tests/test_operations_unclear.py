"""Calls whose end cannot be told, beside others: no address leaves them out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X, W = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)
BLOCK = sg.op("block")


def block(a):
    for _ in range(2):
        a = jnp.sin(a)
    return a


def before(w, x):
    loss = jnp.sum(jax.lax.stop_gradient(block(x)))
    for v in (w, 2 * w):
        loss = loss + jnp.sum(block(v))
    return loss


def after(w, x):
    loss = sum(jnp.sum(block(v)) for v in (w, 2 * w))
    return loss + jnp.sum(block(x))


def times(w, n):
    for _ in range(n):
        w = jnp.sin(w)
    return w


def added(w, x):
    return sum(times(w, n).sum() for n in (1, 2)) + times(x, 1).sum()


def inside(w, x):
    return jax.jit(lambda *args: before(*args))(w, x) + jnp.sum(block(x))


PROGRAMS = {"before": before, "after": after, "inside": inside}
ASKED = {
    "gradients by": lambda f, a: sg.gradients(f, a),
    "stopped": lambda f, a: sg.gradients(f, "w", stop_gradients=a),
    "capture": lambda f, a: sg.capture(f, a),
    "edit": lambda f, a: sg.edit(f, {a: lambda op, *args: 0 * op(*args)}),
    "no gradient": lambda f, a: sg.assert_no_gradient(f, a),
}
asked = pytest.mark.parametrize("ask", ASKED)


UNTOLD = "a call whose end cannot be told: loops run around it"


def refused(run):
    """Return what an address is refused with, which says where and what to write."""
    with pytest.raises(sg.AddressError) as caught:
        run()
    said = " ".join(str(caught.value).split())
    assert "test_operations_unclear.py:" in said
    assert "write: a jitted function, or an operation in it" in said
    return said


@pytest.mark.parametrize("program", PROGRAMS)
@asked
def test_one_that_cannot_be_told_is_refused_beside_others(ask, program):
    assert UNTOLD in refused(lambda: ASKED[ask](PROGRAMS[program], BLOCK)(W, X))


@asked
def test_of_a_sum(ask):
    assert UNTOLD in refused(lambda: ASKED[ask](added, sg.op("times"))(W, X))
    assert UNTOLD in refused(
        lambda: ASKED[ask](added, sg.op(("times", "reduce_sum")))(W, X)
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_the_error_says_to_write(program, monkeypatch):
    slope = lambda a: jnp.cos(jnp.sin(a)) * jnp.cos(a)
    sin = PROGRAMS[program]
    np.testing.assert_array_equal(
        sg.edit(sin, {sg.op("sin"): lambda op, a: 0 * op(a)})(W, X), 0
    )
    monkeypatch.setitem(globals(), "block", jax.jit(block))
    fun = PROGRAMS[program]
    found = sg.gradients(fun, "w")(W, X)
    np.testing.assert_allclose(found, slope(W) + 2 * slope(2 * W), rtol=1e-5)
    assert sg.gradients(fun, "w", stop_gradients=BLOCK)(W, X) is None
    assert sg.edit(fun, {BLOCK: lambda op, a: 0 * op(a)})(W, X) == 0


@pytest.mark.parametrize(
    ("fun", "nth"),
    [(before, 0), (before, slice(0, 1)), (after, -1), (after, slice(-1, None))],
)
def test_nth_may_mean_one_that_can_be_told(fun, nth):
    _, found = sg.capture(fun, address := sg.op("block", nth=nth))(W, X)
    (value,) = jax.tree.leaves(found[address])
    np.testing.assert_allclose(value, jnp.sin(jnp.sin(X)), rtol=1e-6)


@pytest.mark.parametrize(
    ("fun", "nth"),
    [
        *((before, nth) for nth in (1, 2, 7, -1, -2, slice(None), slice(1, None))),
        *((after, nth) for nth in (0, 1, 2, -2, slice(None, -1), slice(None, None, 2))),
    ],
)
def test_nth_that_counts_what_cannot_be_counted_is_refused(fun, nth):
    assert UNTOLD in refused(lambda: sg.capture(fun, sg.op("block", nth=nth))(W, X))


def test_within_leaves_them_out():
    def other(x):
        return jnp.sum(block(x))

    fun = lambda w, x: before(w, x) + other(x)
    address = sg.op("block", within="other")
    np.testing.assert_allclose(
        sg.capture(fun, address)(W, X)[1][address], jnp.sin(jnp.sin(X)), rtol=1e-6
    )
    assert UNTOLD in refused(
        lambda: sg.capture(fun, sg.op("block", within="before"))(W, X)
    )


# -- calls of which a derivative has been taken ---


def both(w):
    slope = jax.grad(lambda v: jnp.sum(block(v)))(w)
    return jnp.sum(slope * block(w))


def in_a_scope(w):
    with jax.named_scope("slope"):
        slope = jax.grad(lambda v: jnp.sum(jax.nn.softmax(v) ** 2))(w)
    with jax.named_scope("value"):
        return jnp.sum(slope * jax.nn.softmax(w))


def in_a_jit(w):
    slope = jax.jit(jax.grad(lambda v: jnp.sum(block(v))))(w)
    return jnp.sum(slope) + jnp.sum(block(w))


@asked
@pytest.mark.parametrize("fun", [both, in_a_jit])
def test_a_call_is_not_left_out_beside_others(fun, ask):
    with pytest.raises(sg.AddressError, match="one whose derivative has been taken"):
        ASKED[ask](fun, BLOCK)(W)


def test_a_scope_tells_the_one_apart():
    with pytest.raises(sg.AddressError, match=r"derivative has been taken \(.*\d\)"):
        sg.capture(in_a_scope, sg.op("softmax"))(W)
    address = sg.op("softmax", within="value")
    found = sg.capture(in_a_scope, address)(W)[1][address]
    np.testing.assert_array_equal(found, jax.nn.softmax(W))


def test_what_is_an_equation_of_its_own_is_found_there_too():
    def fun(w):
        return jnp.sum(jax.grad(lambda v: jnp.sum(jnp.sin(v)))(w) * jnp.sin(w))

    found = sg.capture(fun, sg.op("sin"))(W)[1][sg.op("sin")]
    np.testing.assert_array_equal(found, [jnp.sin(W)] * 2)
    where = lambda v: jnp.sum(jnp.where(v > 0, v, 0.0))
    fun = lambda w: jnp.sum(jax.grad(where)(w)) + where(w)
    assert len(sg.capture(fun, sg.op("where"))(W)[1][sg.op("where")]) >= 2


# -- calls of Python's own that call back several times are one call ---


def half(x):
    return jnp.tanh(x) * 0.5


def of_a_star(x):
    return jnp.sum(jnp.multiply(*map(half, (x, x + 1.0))))


def of_extend(x):
    parts = [x]
    parts.extend(map(half, (x, x + 1.0)))
    return jnp.sum(parts[1] * parts[2])


def of_update(x):
    parts = {}
    parts.update(zip("ab", map(half, (x, x + 1.0)), strict=True))
    return jnp.sum(parts["a"] * parts["b"])


class Part:
    def __init__(self):
        self.parts = []

    def __call__(self, x):
        self.parts.extend(map(half, (x, x + 1.0)))
        return jnp.sum(self.parts[0] * self.parts[1])


def of_a_part(x):
    return Part()(x)


@pytest.mark.parametrize("call", [of_a_star, of_extend, of_update, of_a_part])
def test_what_calls_back_is_one_call(call):
    fun = lambda w: 3.0 * call(w)
    address = sg.op("Part" if call is of_a_part else call.__name__)
    np.testing.assert_allclose(sg.capture(fun, address)(W)[1][address], call(W))
    np.testing.assert_array_equal(sg.gradients(fun, address)(W), 3.0)
    doubled = sg.edit(fun, {address: lambda op, *args: 2.0 * op(*args)})(W)
    np.testing.assert_allclose(doubled, 6.0 * call(W), rtol=1e-6)


# -- what the derivative of its own operation is computed from ---


def energy(f, v=lambda h: h):
    """The force of an energy is fitted: a derivative is differentiated."""

    def loss(w):
        def total(r):
            h = v(f(w * r))
            return jnp.sum(h**2)

        return jnp.sum(jax.grad(total)(jnp.abs(X)) ** 2)

    return loss


named = lambda h: sg.name(h, "h")
FACTORS = [jnp.exp, jnp.tanh, jax.nn.sigmoid, jnp.sqrt]


@pytest.mark.parametrize("f", FACTORS)
def test_a_factor_of_its_own_derivative(f):
    """By the variable is not by what its rule keeps of it, so it is refused."""
    fun, address, w = energy(f), sg.var("total.h"), jnp.abs(W)
    for ask in (
        lambda: sg.gradients(fun, address)(w),
        lambda: sg.gradients(fun, "w", stop_gradients=address)(w),
        lambda: sg.gradient_stats(fun, address)(w),
        lambda: sg.perturb(fun, [address])({address: jnp.zeros(3)}, w),
    ):
        with pytest.raises(ValueError, match="read by later operations only"):
            ask()
    value = jnp.sum(sg.capture(fun, address)(w)[1][address])
    np.testing.assert_allclose(value, jnp.sum(f(w * jnp.abs(X))), rtol=1e-6)
    by_name = sg.gradients(energy(f, named), "w", stop_gradients="h")(w)
    assert by_name is not None


@pytest.mark.parametrize("f", [jnp.sin, jnp.square, lambda x: x * x])
def test_what_its_derivative_does_not_read(f):
    address = sg.var("total.h")
    found = sg.gradients(energy(f), address)(W)
    np.testing.assert_array_equal(found, sg.gradients(energy(f, named), "h")(W))
    found = sg.gradients(energy(f), "w", stop_gradients=address)(W)
    other = sg.gradients(energy(f, named), "w", stop_gradients="h")(W)
    np.testing.assert_allclose(found, other, rtol=1e-6)
