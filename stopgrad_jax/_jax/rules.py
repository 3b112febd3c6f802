"""Custom derivative rules: whose they are, what they hold, where they are written.

Part of `_jax`, the only door to JAX that is version-dependent or not public.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from jax.interpreters import ad

from .closures import is_filled, tracers_in
from .equations import CUSTOM, high_of, kind_of, opened, params_of
from .places import OWN, is_own


def has_own_jvp(eqn: Any) -> bool:
    """Tell the call of a `custom_jvp`."""
    return kind_of(eqn) == CUSTOM[0]


def has_own_vjp(eqn: Any) -> bool:
    """Tell the call of a `custom_vjp`."""
    return kind_of(eqn) == CUSTOM[1]


def sees_which_move(eqn: Any) -> bool:
    """Tell a derivative rule that is told which operands are differentiated.

    A custom rule with symbolic zeros is, and one whose function closes over arrays: JAX
    hands those over as leading operands, and raises where one of them moves. So is the
    rule that another package has given to a primitive of its own.
    """
    name = eqn.primitive.name
    if name in CUSTOM:
        return bool(eqn.params["symbolic_zeros"] or eqn.params["num_consts"])
    if name == "gate":
        return eqn.params["rule"].only_sources is not None
    return name == "call_hi_primitive" or not _has_rule_of_jax(eqn.primitive)


def _has_rule_of_jax(primitive: Any) -> bool:
    """Tell whether JAX, or this package, differentiates a primitive."""
    rule = ad.primitive_jvps.get(primitive)
    while isinstance(rule, functools.partial):
        rule = rule.func
    # Without a rule there is no derivative that could be told anything.
    code = getattr(rule, "__code__", None)
    return rule is None or (code is not None and code.co_filename.startswith(OWN))


def custom_rule(eqn: Any) -> tuple[Any, ...] | None:
    """Return the user's functions behind a custom rule, to tell rules apart.

    JAX wraps a rule anew at every call, so two calls of `relu` hold different
    objects; the functions in their closures are the same. None: not found, and
    the caller must take every call for a different rule.
    """
    high, found = high_of(eqn), list[Any]()
    if high is not None:
        rules = [v for v in high.params.values() if isinstance(v, types.FunctionType)]
        written = [f for rule in rules for f in _written(rule)]
        return (high.in_tree, high.params["symbolic_zeros"], *written)
    wraps = [v for v in eqn.params.values() if hasattr(v, "call_wrapped")]
    for _ in range(4):  # the wrappers are three closures deep on 0.10 and 0.12
        inner = []
        for wrapped in wraps:
            function = wrapped.f if hasattr(wrapped, "call_wrapped") else wrapped
            for transform in getattr(wrapped, "transforms", ()):
                # JAX makes some of these functions anew at every call: they would tell
                # it from all others.
                static = [p for p in transform[1] if not callable(p)]
                found.append((transform[0], *static))
            cells = [
                c.cell_contents for c in getattr(function, "__closure__", None) or ()
            ]
            hidden = [c for c in cells if hasattr(c, "call_wrapped")]
            hidden += [c for c in cells if _is_jax_closure(c)]
            if hidden and _is_jax_closure(function):
                inner += hidden
            else:
                found.append(function)
        wraps = inner
    return tuple(found) if found and not wraps else None


def closes_over_tracers(eqn: Any) -> bool:
    """Tell whether a custom rule closes over a value that was traced with it.

    JAX calls the rule when a derivative is taken; that value's trace has ended by then.
    """
    return any(True for _ in tracers_in(custom_rule(eqn) or ()))


def _written(rule: types.FunctionType) -> list[types.FunctionType]:
    """Functions that a function of JAX closes over, or itself."""
    cells = [c.cell_contents for c in rule.__closure__ or ()]
    inner = [f for f in cells if isinstance(f, types.FunctionType)]
    own = rule.__code__.co_filename.startswith(OWN[0])
    return inner if own and inner else [rule]


def _is_jax_closure(f: Any) -> bool:
    module = getattr(f, "__module__", None) or ""
    return callable(f) and module == "jax._src.interpreters.partial_eval"


def rule_site(eqn: Any) -> str:
    """Return `file:line` of the function that has this custom rule, or "".

    `jax.custom_gradient` wraps the user's function in its own: then it is the one that
    the wrapper closes over.
    """
    debug_info = opened(params_of(eqn)["call_jaxpr"])[0].debug_info
    place = debug_info.func_src_info.partition(" at ")[2] if debug_info else ""
    if not is_own(place):
        return place
    for rule in custom_rule(eqn) or ():
        for cell in getattr(rule, "__closure__", None) or ():
            code = is_filled(cell) and getattr(cell.cell_contents, "__code__", None)
            if code and not is_own(code.co_filename):
                return f"{code.co_filename}:{code.co_firstlineno}"
    return place
