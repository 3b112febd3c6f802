"""A variable is the array that it was seen to be given, or the address is refused.

The oracle is the program itself with a list: `kept` holds what the variable was.
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, keep, kept, same

import stopgrad_jax as sg
from stopgrad_jax._source.watched import watching

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, -0.7, 1.1)
SEEN = "it was seen to be given other arrays than its text tells"


def of_a_dead_result(x):
    others = []
    h = others.append(jnp.cos(x)) or keep(jnp.sin(x))  # noqa: F841
    return jnp.sum(others[0] * x)


def in_two_ways(x):
    for first, then in ((jnp.sin, same), (same, jnp.cos)):
        x = then(first(x))
    return jnp.sum(x)


def by_a_cast(x):
    parts = []
    for dtype in (jnp.bfloat16, jnp.float32):
        v = x.astype(dtype)
        parts.append(v)
    return sum(jnp.sum(part.astype(jnp.float32)) for part in parts)


def on_one_line(x):
    parts = []
    # fmt: off
    for f in (jnp.sin, same): h = f(x); parts.append(h)  # noqa: E701, E702
    # fmt: on
    return jnp.sum(parts[0]) + jnp.sum(parts[1])


def of_a_generator(x):
    def parts():
        for f in (jnp.sin, same):
            h = f(x)
            yield h

    return sum(map(jnp.sum, parts()))


def in_a_scan(x):
    def body(c, _):
        for f in (jnp.sin, same):
            h = f(c)
            c = c + jax.nn.relu(h)
        return c, None

    return jnp.sum(jax.lax.scan(body, x, None, length=2)[0])


def in_a_vmap(x):
    def one(v):
        parts = []
        for f in (jnp.sin, same):
            h = f(v)
            parts.append(h)
        return parts[0] + parts[1]

    return jnp.sum(jax.vmap(one)(x))


def mixed(a, b):
    return a * b


def half(x):
    return jnp.tanh(x) * 0.5


def of_several_calls(x):
    for _ in range(2):
        h = mixed(*map(half, (x, x + 1.0)))
        x = x + keep(h)
    return jnp.sum(x)


def of_a_product(x):
    for _ in range(2):
        h = math.prod([x, x + 1.0, x + 2.0])
        x = jnp.tanh(keep(h))
    return jnp.sum(x)


def of_the_first_round(x):
    h = None
    for k in range(3):
        v = jnp.sin(x * k)
        h = v if h is None else h + v
    return jnp.sum(h)


class Head:
    def __init__(self, act):
        self.act = act

    def __call__(self, z):
        h = z * 2.0
        h = self.act(h) if self.act else h
        return h


def of_a_head(x):
    return jnp.sum(Head(jnp.tanh)(x) ** 2) + jnp.sum(Head(None)(x) ** 2)


def of_a_last_layer(x):
    for k in range(3):
        h = x * 2.0
        h = jax.nn.relu(h) if k < 2 else h
        x = h
    return jnp.sum(x)


def of_a_cast(x):
    parts = []
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float32):
        h = jnp.cos(x)
        h = h.astype(dtype)
        parts.append(h)
    return sum(jnp.sum(part.astype(jnp.float32)) for part in parts)


@jax.jit
def traced_before(x):
    parts = []
    for f in (jnp.sin, same):
        h = f(x)
        parts.append(h)
    return jnp.sum(parts[0] * parts[1])


REFUSED = {
    of_a_dead_result: "h",
    in_two_ways: "in_two_ways.x",
    by_a_cast: "v",
    on_one_line: "h",
    of_a_generator: "h",
    in_a_scan: "h",
    in_a_vmap: "h",
    traced_before: "h",
}


@pytest.mark.parametrize("fun", REFUSED, ids=lambda fun: str(fun.__name__))
def test_what_is_not_found_is_refused(fun):
    """None of its executions is left out, and no other array is taken for it."""
    fun(X)
    address = sg.var(REFUSED[fun])
    for ask in (
        lambda: sg.capture(fun, address)(X),
        lambda: sg.gradients(fun, address)(X),
        lambda: sg.edit(fun, {address: lambda v: 0 * v})(X),
    ):
        with pytest.raises(sg.AddressError) as caught:
            ask()
        said = " ".join(str(caught.value).split())
        assert "test_var_watched.py:" in said
        assert (
            SEEN in said
            or "is called there for several values" in said
            or "no operation made what it is given" in said
        )


def every_time(x):
    for k in range(3):
        h = keep(jnp.sin(x * k))
        x = x + h
    return jnp.sum(x)


def at_once(x):
    # fmt: off
    for k in range(3): h = keep(jnp.sin(x * k)); x = x + h  # noqa: E701, E702
    # fmt: on
    return jnp.sum(x)


def by_walrus(x):
    return sum(jnp.sum(h) for k in range(3) if (h := keep(jnp.sin(x * k))) is not None)


def again_on_one_line(x):
    # fmt: off
    h = keep(jnp.sin(x)); h = h * 2.0  # noqa: E702
    # fmt: on
    return jnp.sum(h)


FOUND = [every_time, at_once, by_walrus, again_on_one_line, of_several_calls]


@pytest.mark.parametrize("fun", [*FOUND, of_a_product])
def test_what_is_found_is_what_was_seen(fun):
    kept.clear()
    with jax.disable_jit():
        fun(X)
    oracle = [np.asarray(v) for v in kept]
    address = sg.var("h", nth=0) if fun is again_on_one_line else sg.var("h")
    found = jax.tree.leaves(sg.capture(fun, address)(X)[1][address])
    assert len(found) == len(oracle)
    for one, other in zip(found, oracle, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    "fun", [of_the_first_round, of_a_head, of_a_last_layer, of_a_cast]
)
def test_an_execution_that_only_takes_another_array_over(fun):
    for address in (sg.var("h", nth=1), sg.var("h", nth=-1)):
        for ask in (
            lambda a=address: sg.capture(fun, a)(X),
            lambda a=address: sg.gradients(fun, "x", stop_gradients=a)(X),
        ):
            with pytest.raises(sg.AddressError) as caught:
                ask()
            said = str(caught.value)
            assert SEEN in said or "no operation made what it is given" in said


class Metrics(dict):
    def add(self, **kwargs):
        self.update(kwargs)
        return self


def pushed(parts, v):
    parts.append(v)
    return len(parts)


def objects(x):
    parts = []
    count = pushed(parts, jnp.sin(x))
    scaled = lambda u, c=jnp.cos(x): u * c  # noqa: B008
    metrics = Metrics().add(loss=jnp.mean(x**2))
    each = list(map(jnp.sin, [x]))
    method = (x * 11.0).sum
    total = jnp.sum(scaled(parts[0])) * count + metrics["loss"] + method()
    return total + jnp.sum(each[0])


@pytest.mark.parametrize("name", ["count", "scaled", "metrics", "each", "method"])
def test_an_object_is_not_the_array_that_is_in_it(name):
    with pytest.raises(sg.AddressError, match=r"object, not one|container of|clear"):
        sg.capture(objects, sg.var(name))(X)
    total = sg.capture(objects, sg.var("total"))(X)[1][sg.var("total")]
    assert total.shape == ()


def test_a_line_that_raises_after_it_has_assigned():
    def checked(x, bad):
        # fmt: off
        h = jnp.sin(x); pushed([], 1 / (not bad))  # noqa: E702
        # fmt: on
        return h * 2.0

    def fun(x):
        out = 0.0
        for bad in (True, False):
            try:
                out = out + checked(x * (1.0 + bad), bad)
            except ZeroDivisionError:
                out = out + jnp.cos(x)
        return jnp.sum(out)

    found = sg.capture(fun, sg.var("h"))(X)[1][sg.var("h")]
    np.testing.assert_allclose(found, [jnp.sin(2 * X), jnp.sin(X)], rtol=1e-6)


def test_a_function_that_cannot_be_called_twice():
    calls = []

    def once(x):
        assert not calls
        calls.append(x)
        h = jnp.sin(x)
        return jnp.sum(h)

    found = sg.capture(once, sg.var("h"))(X)[1][sg.var("h")]
    np.testing.assert_array_equal(found, jnp.sin(X))


def test_nothing_of_a_trace_is_kept():
    with jax.checking_leaks():
        for fun in (in_two_ways, of_a_generator):
            with pytest.raises(sg.AddressError, match=SEEN):
                sg.capture(fun, sg.var(REFUSED[fun]))(X)
        with watching(frozenset("h")) as watch:
            jax.make_jaxpr(in_a_vmap)(X)
        assert [s.name for s in watch.seen] == ["h", "h"]


def test_the_listener_is_gone_afterwards():
    before = sys.gettrace()

    def tools():
        if sys.version_info < (3, 12):
            return []
        return [sys.monitoring.get_tool(k) for k in range(6)]

    free = tools()
    sg.capture(every_time, sg.var("h"))(X)
    watched = watching(frozenset("h"))
    watched.__enter__()
    every_time(X)
    assert not watched.__exit__(ValueError, ValueError("of the function"), None)
    assert sys.gettrace() is before
    assert tools() == free


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has one of them")
def test_others_listen():
    free = [k for k in range(6) if sys.monitoring.get_tool(k) is None]
    for k in free:
        sys.monitoring.use_tool_id(k, "another")
    try:
        found = sg.capture(by_walrus, sg.var("h"))(X)[1][sg.var("h")]
    finally:
        for k in free:
            sys.monitoring.free_tool_id(k)
    assert len(found) == 3


def test_no_code_of_what_a_variable_holds_is_run():
    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("asked")

    def fun(x):
        for f in (jnp.sin, jnp.cos):
            h = f(x)
            y = jnp.sum(h)
            h = Proxy()
        return y

    address = sg.var("h", nth=0)
    found = sg.capture(fun, address)(X)[1][address]
    np.testing.assert_array_equal(found, [jnp.sin(X), jnp.cos(X)])
