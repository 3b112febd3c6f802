"""Derivative rules that close over values of the function around them.

JAX calls a custom rule when a derivative is taken. By then the trace of a program that
is run anew has ended, and with it the value that the rule closes over. What stands in
its place is not known for sure (a variable may have been assigned again), so such a
rule is no part of a program that is run anew: there it says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats
from stopgrad_jax._program.anew import map_jaxprs, with_eqns
from stopgrad_jax._program.control import control
from stopgrad_jax._program.trace import Traced

_INSTEAD = (
    "sg.with_backward(fun, backward)(x, value): an argument there, for which backward "
    "returns a cotangent or None"
)


def not_compiled(called: str) -> str:
    """Say of a gradient that JAX itself cannot take under `jax.jit`."""
    return beats(
        called,
        "a gradient that can be compiled, as jax.jit(jax.grad(fun))",
        "a custom rule that closes over a value of the function around it, at which "
        "jax.jit of the gradient raises",
        f"{_INSTEAD}; or find_nonfinite(fun, xs=()), which looks forward",
    )


def holds_closure(jaxpr: Any) -> bool:
    """Tell whether a custom rule in a program closes over what was traced with it."""
    for eqn in jaxpr.eqns:
        if _jax.kind_of(eqn) in _jax.CUSTOM and _jax.closes_over_tracers(eqn):
            return True
        inner = control(eqn)
        if inner is not None and any(holds_closure(b.jaxpr) for b in inner.bodies):
            return True
    return False


def refusing(traced: Traced, called: str) -> Traced:
    """Return a traced function whose rules say it where they cannot be called anew.

    Its values are the same. A rule that JAX can call as it is stays as it is.
    """
    if not holds_closure(traced.jaxpr):
        return traced
    jaxpr = _refusing(traced.jaxpr, frozenset(), "", called)
    return dataclasses.replace(traced, jaxpr=jaxpr)


def _refusing(jaxpr: Any, around: frozenset[Any], line: str, called: str) -> Any:
    """Change the rules in a program.

    `around` are the variables of those around it, `line` is where it is called.
    """
    made = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    ended = around.union(jaxpr.constvars, jaxpr.invars, made)

    def changed(eqn: Any) -> Any:
        here = _jax.line_of(eqn) or line
        if eqn.primitive.name not in _jax.CUSTOM:
            return map_jaxprs(eqn, lambda inner: _refusing(inner, ended, here, called))
        if _jax.closes_over_tracers(eqn) and _reads(eqn, ended):
            return _with_rule_that_raises(eqn, here, called)
        return eqn

    eqns = [changed(eqn) for eqn in jaxpr.eqns]
    if all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True)):
        return jaxpr
    return with_eqns(jaxpr, eqns, jaxpr.outvars)


def _reads(eqn: Any, ended: frozenset[Any]) -> bool:
    """Tell whether the derivative of a custom rule reads one of these variables.

    It need not read all that it closes over.
    """
    closed = range(eqn.params["num_consts"])
    moved = [
        k
        for k, atom in enumerate(eqn.invars)
        if k not in closed and _jax.is_differentiable(atom.aval)
    ]

    def derivative(*operands: Any) -> Any:
        def function(*values: Any) -> list[Any]:
            everything = list(operands)
            for k, value in zip(moved, values, strict=True):
                everything[k] = value
            out = _jax.bind(eqn, *everything)
            return [x for x in out if _jax.carries_gradient(x)]

        # The values serve as tangents, too: only what the rule reads is looked at.
        primals = [operands[k] for k in moved]
        if _jax.has_own_jvp(eqn):
            return jax.jvp(function, primals, primals)
        out, pull = jax.vjp(function, *primals)
        return out, pull(out)

    avals = [atom.aval for atom in eqn.invars]
    try:
        jaxpr, consts = _jax.opened(_jax.closed_at(eqn, derivative, *avals))
    except Exception:  # whatever it raises, it raises where it is called, too
        return False
    return any(_jax.variable_of(x) in ended for x in (*consts, *_jax.held(jaxpr)))


def _with_rule_that_raises(eqn: Any, line: str, called: str) -> Any:
    """Return a call of a custom rule, with another rule."""
    name = _jax.call_name(eqn) or "it"
    place = f"{name} ({line})" if line else name
    error = beats(
        called,
        "custom rules that take what they need as arguments, where a derivative is "
        "taken",
        f"the rule of {place}, which closes over a value of the function around it",
        f"{_INSTEAD}; or a constant made outside of the function",
    )

    def rule(*_: Any) -> Any:
        raise TypeError(error)

    def function(*operands: Any) -> list[Any]:
        return _jax.bind(eqn, *operands)

    again: Callable[..., Any]
    if _jax.has_own_jvp(eqn):
        again = jax.custom_jvp(function)
        again.defjvp(rule)
    else:
        again = jax.custom_vjp(function)
        again.defvjp(rule, rule)
    avals = [atom.aval for atom in eqn.invars]
    (new,) = _jax.opened(_jax.closed_at(eqn, again, *avals))[0].eqns
    # The body stays: what is in it is looked for, and is read by its name.
    body = {"call_jaxpr": eqn.params["call_jaxpr"]}
    return eqn.replace(params=dict(new.params) | body)
