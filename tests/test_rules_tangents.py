"""Rules that call other rules and gates with their tangents or cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import f32

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
A, B = f32(0.3, -0.7, 1.1), f32(0.5, 0.2, -0.4)


def rolled(u, v):
    return jnp.roll(u, 1), jnp.roll(v, 1)


by_itself = jax.custom_jvp(rolled)
by_itself.defjvp(lambda primals, tangents: (by_itself(*primals), by_itself(*tangents)))


def with_tangents_by(function):
    """A rule that hands its tangents to a function before it rolls them."""
    f = jax.custom_jvp(rolled)
    f.defjvp(lambda primals, ts: (f(*primals), rolled(*function(ts))))
    return f


def with_cotangents_by(function):
    """A rule that hands its cotangents to a function before it rolls them back."""
    f = jax.custom_vjp(rolled)
    back = lambda _, cts: tuple(jnp.roll(ct, -1) for ct in function(cts))
    f.defvjp(lambda u, v: (f(u, v), None), back)
    return f


def of_a_gated(u, v):
    return rolled(*sg.clip_gradient_norm((u, v), 0.5))


differentiated = jax.custom_jvp(rolled)
differentiated.defjvp(lambda primals, ts: jax.jvp(of_a_gated, primals, ts))
same = jax.custom_vjp(lambda cts: (cts[0], cts[1]))
same.defvjp(lambda cts: (same(cts), None), lambda _, cts: (cts,))


def clip(ts):
    return sg.clip_gradient_norm(tuple(ts), 0.5)


RULES = {
    "itself": by_itself,
    "a clip of tangents": with_tangents_by(clip),
    "a scale of tangents": with_tangents_by(lambda ts: sg.scale_gradient(ts, 2.0)),
    "a clip of cotangents": with_cotangents_by(clip),
    "a rule of cotangents": with_cotangents_by(same),
    "another rule of cotangents": with_cotangents_by(lambda cts: by_itself(*cts)),
    "a gated function": differentiated,
    "vmap": jax.vmap(by_itself),
    "jit": jax.jit(with_tangents_by(jax.jit(clip))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_result_that_is_stopped_gives_nothing_to_its_own_operand(rule, stopped):
    def f(a, b):
        results = list(RULES[rule](a, b))
        results[stopped] = lax.stop_gradient(results[stopped])
        return jnp.sum(results[0] ** 2 * results[1])

    grads = jax.grad(f, (0, 1))(A, B)
    wanted = ["flows", "flows"]
    wanted[stopped] = "cut"
    assert [bool(np.any(g)) for g in grads] == [w == "flows" for w in wanted]
    assert [row.status for row in sg.flow(f)(A, B).inputs] == wanted
    path, other = "ab"[stopped], "ba"[stopped]
    assert sg.gradients(f, path)(A, B) is None
    np.testing.assert_array_equal(sg.gradients(f, other)(A, B), grads[1 - stopped])
    sg.assert_no_gradient(f, path)(A, B)
    sg.assert_gradient(f, other)(A, B)
    with pytest.raises(AssertionError, match="stop_gradient"):
        sg.assert_gradient(f, path)(A, B)


@pytest.mark.parametrize("rule", RULES)
def test_a_result_that_is_not_read(rule):
    f = lambda a, b: jnp.sum(RULES[rule](a, b)[1])
    assert [row.status for row in sg.flow(f)(A, B).inputs] == ["unused", "flows"]
    assert not np.any(jax.grad(f)(A, B))


def adds(cts):
    return cts[0] + 2 * cts[1], cts[1]


def takes_first(ts):
    return sg.replace_value(ts[0], ts[1]), ts[1]


# JAX transposes what a rule does with tangents: a gate's rule is its transpose.
TRANSPOSED = {
    "mixed": with_tangents_by(lambda ts: sg.transform_gradient(tuple(ts), adds)),
    "value of another": with_tangents_by(takes_first),
    "mixed cotangents": with_cotangents_by(adds),
    "mixed in a call": with_tangents_by(
        jax.jit(lambda ts: sg.transform_gradient(tuple(ts), adds))
    ),
}


@pytest.mark.parametrize("rule", TRANSPOSED)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_transposed_decides(rule, which):
    f = lambda a, b: jnp.sum(TRANSPOSED[rule](a, b)[which])
    grads = [bool(np.any(g)) for g in jax.grad(f, (0, 1))(A, B)]
    statuses = [row.status for row in sg.flow(f)(A, B).inputs]
    assert [word == "flows" for word in statuses] == grads
