"""Each verb on a program of the zoo, against plain JAX."""

from __future__ import annotations

import functools
import linecache
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from peers.zoo.program import (
    Program,
    added,
    doubled,
    floats,
    gradients,
    gradients_at,
    seen,
    with_floats,
)

import stopgrad_jax as sg

# A few roundings of what a sum is made of; below it, a gradient has cancelled.
RTOL, ATOL = 1e-4, 1e-6


def near(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL * max(1, np.max(np.abs(b))))


def expected(program: Program, path: str) -> str:
    if path in program.cut:
        return "cut"
    return "unused" if path in program.unused else "flows"


def paths(program: Program, *words: str) -> list[str]:
    every = floats(program, program.points[0])
    return [path for path in every if expected(program, path) in words]


def check_flow(program: Program) -> None:
    """A gradient flows where it is not zero, and a zero is exact at every point."""
    flow = sg.flow(program.fun)(*program.points[0])
    found = {path: _status(flow, path) for path in floats(program, program.points[0])}
    assert found == {path: expected(program, path) for path in found}
    _agree(found, gradients(program), program)
    for path in paths(program, "unused"):
        run = jax.jit(program.fun)
        for args in program.points:
            other = with_floats(program, args, {path: floats(program, args)[path] + 1})
            assert run(*args) == run(*other)
    if program.terms:
        assert set(program.terms) <= set(flow.terms)
    for term in program.terms:
        found = {path: _status(flow, path, term) for path in found}
        _agree(found, gradients(program, term), program)


def _status(flow: Any, path: str, term: str | None = None) -> str:
    (row,) = [r for r in flow.inputs if f"{path}/".startswith(f"{r.path}/")]
    return row.terms[term] if term else row.status


def _agree(
    found: dict[str, str], grads: list[dict[str, Any]], program: Program
) -> None:
    for path, word in found.items():
        largest = max(np.abs(grad[path]).max() for grad in grads)
        if word != "flows":
            assert largest == 0, path
        elif path in program.zero:
            assert largest < ATOL, path
        else:
            assert largest > ATOL, path


def check_query(program: Program) -> None:
    """`gradients` by every leaf is `jax.grad`; by the inner value, a perturbation's."""
    args = program.points[0]
    leaves = list(floats(program, args))
    got, inner = jax.jit(sg.gradients(program.fun, (leaves, program.inner)))(*args)
    (grad,) = gradients(program)[:1]
    none = {path for path, g in zip(leaves, got, strict=True) if g is None}
    assert none == set(paths(program, "cut", "unused"))
    for path, g in zip(leaves, got, strict=True):
        near(np.zeros_like(grad[path]) if g is None else g, grad[path])
    near(inner, by_inner(program))


def by_inner(program: Program) -> Any:
    args = program.points[0]
    value = jax.eval_shape(functools.partial(seen, program, "inner"), *args)
    zero = jnp.zeros(value.shape, value.dtype)
    return jax.jit(jax.grad(functools.partial(added, program)))(zero, *args)


def check_contracts(program: Program) -> None:
    args, fun = program.points[0], program.fun
    flowing, ending = paths(program, "flows"), paths(program, "cut", "unused")
    sg.assert_gradient(fun, flowing)(*args)
    with _broken(f"{flowing[0]}: expected none, can get a gradient"):
        sg.assert_no_gradient(fun, flowing[0])(*args)
    if ending:
        sg.assert_no_gradient(fun, ending)(*args)
    else:
        fun, ending = _stopped(program), flowing
    with _broken(f"{ending[0]}: expected a gradient, structurally zero"):
        sg.assert_gradient(fun, ending[0])(*args)


def _broken(words: str) -> Any:
    return pytest.raises(AssertionError, match=re.escape(words))


def _stopped(program: Program) -> Callable[..., Any]:
    @functools.wraps(program.fun)
    def stopped(*args: Any) -> Any:
        return program.fun(*jax.lax.stop_gradient(args))

    return stopped


def check_finite(program: Program) -> None:
    """Nothing on healthy arguments; with a nan, what plain JAX makes of it."""
    args = program.points[0]
    assert sg.find_nonfinite(program.fun)(*args) is None
    path = program.planted or paths(program, "flows")[0]
    leaf = floats(program, args)[path]
    bad = {
        path: jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) == 0, jnp.nan, leaf)
    }
    find, args = sg.find_nonfinite(program.fun), with_floats(program, args, bad)
    outcome = planted(program, args)
    if outcome == "raises":
        with pytest.raises(Exception, match=r"find_nonfinite\("):
            find(*args)
    elif outcome == "finite":
        assert find(*args) is None
    else:
        report = find(*args)
        assert report is not None
        assert report.direction == "forward"
        assert path in str(report)


def planted(program: Program, args: Any) -> str:
    """What becomes of a nan: the program raises, has it in the end, or swallows it."""
    try:
        grad = gradients_at(program, args)
        value = jax.block_until_ready(jax.jit(program.fun)(*args))
    except Exception:  # JAX's own, or what a callback of the package raised
        return "raises"
    ends = [value, *grad.values()]
    return "finite" if all(np.isfinite(x).all() for x in ends) else "nonfinite"


def check_born(program: Program) -> None:
    args = program.points[0]

    def shifted(shift, *args):
        def tap(value, name):
            return value + jnp.log(shift) if name == "inner" else value

        return program.fun(*args, tap=tap)

    def rooted(shift, *args):
        def tap(value, name):
            return value + jnp.sqrt(shift) if name == "inner" else value

        return program.fun(*args, tap=tap)

    assert sg.find_nonfinite(shifted)(1.0, *args) is None
    report = sg.find_nonfinite(shifted)(-1.0, *args)
    assert _at(report) == ("forward", "jnp.log(shift)")
    report = sg.find_nonfinite(rooted, "shift")(0.0, *args)
    assert _at(report) == ("backward", "jnp.sqrt(shift)")


def _at(report: Any) -> tuple[str, str]:
    assert report is not None
    assert report.expression in linecache.getline(__file__, report.line)
    return report.direction, report.expression


def check_check(program: Program) -> None:
    args = program.points[0]
    if program.wide:
        args = jax.tree.map(np.asarray, args)
    with jax.enable_x64(program.wide):
        if program.wide:
            args = jax.tree.map(_wide, args)
        check = functools.partial(sg.check_gradients, program.fun)
        if program.allow:
            with pytest.raises(AssertionError, match=re.escape(program.allow[0])):
                check()(*args)
        check(allow=program.allow)(*args)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, "float64") if x.dtype == "float32" else jnp.asarray(x)


def check_capture(program: Program) -> None:
    args = program.points[0]
    out, values = jax.jit(sg.capture(program.fun, program.inner))(*args)
    value, inner = jax.jit(
        lambda *args: (program.fun(*args), seen(program, "inner", *args))
    )(*args)
    near(out, value)
    near(values[program.inner], inner)


def check_edit(program: Program) -> None:
    args = program.points[0]

    def both(fun):
        def loss(values, args):
            return fun(*with_floats(program, args, values))

        return jax.jit(jax.value_and_grad(loss))(floats(program, args), args)

    # In an inner `jax.grad` the order in which cotangents are added is that of the
    # traced program, for JAX too, and sums have other roundings in another order.
    def traced(*args):
        program_of = jax.make_jaxpr(program.fun)(*args)
        return jax.extend.core.jaxpr_as_fun(program_of)(*jax.tree.leaves(args))[0]

    same, plain = (
        both(sg.edit(program.fun, {program.inner: lambda h: h})),
        both(program.fun),
    )
    jax.tree.map(np.testing.assert_array_equal, same, both(traced))
    np.testing.assert_array_equal(same[0], plain[0])
    jax.tree.map(near, same[1], plain[1])
    twice = both(sg.edit(program.fun, {program.inner: lambda h: 2 * h}))
    jax.tree.map(near, twice, both(functools.partial(doubled, program)))


def check_stats(program: Program) -> None:
    args = program.points[0]
    leaves = list(floats(program, args))
    stats = jax.jit(sg.gradient_stats(program.fun, leaves))(*args)
    (grad,) = gradients(program)[:1]
    near(
        [stats[path].norm for path in leaves],
        [np.linalg.norm(np.ravel(grad[path])) for path in leaves],
    )
    told = {path for path in leaves if stats[path].cause is not None}
    assert told == set(paths(program, "cut", "unused"))


VERBS = {
    "flow": check_flow,
    "gradients": check_query,
    "contracts": check_contracts,
    "find_nonfinite": check_finite,
    "find_nonfinite, born inside": check_born,
    "check_gradients": check_check,
    "capture": check_capture,
    "edit": check_edit,
    "gradient_stats": check_stats,
}
