"""Equations and programs: what is in them, whatever a version of JAX calls it."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from .closures import is_filled, tracers_in
from .places import OWN, is_own
from .types import is_traced

Jaxpr = core.Jaxpr
ClosedJaxpr: Any = core.ClosedJaxpr  # type: ignore
Literal = core.Literal
Primitive = core.Primitive

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Frames of this package are not "the user's line" in JAX's messages or in ours.
source_info_util.register_exclusion(PACKAGE)


def _leave_out_of_tracebacks(folder: str) -> None:
    """Have JAX leave our frames out of the tracebacks from which it removes its own.

    Not public; without it, tracebacks of derivatives show them.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import traceback_util  # noqa: TID251

        traceback_util.register_exclusion(folder)


_leave_out_of_tracebacks(PACKAGE)


# Jaxprs ------------------------------------------------------------------------


def opened(jaxpr: Any) -> tuple[Jaxpr, tuple[Any, ...]]:
    """Split a closed or open jaxpr into the open one and its constants.

    Unwraps once: from JAX 0.11.1 `closed.jaxpr is closed`.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def subjaxpr(eqns: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Make a jaxpr out of a run of equations of another one."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    info = core.DebugInfo("stopgrad_jax", "run", None, None)
    return Jaxpr((), list(invars), list(outvars), list(eqns), effects, info)


def closed_over(closed: Any) -> tuple[Jaxpr, list[Any]]:
    """Split a closed jaxpr: its constants become the first inputs.

    From JAX 0.11 a jaxpr holds its constants: kept, they would leak their trace.
    """
    jaxpr, consts = opened(closed)
    invars = [*jaxpr.constvars, *jaxpr.invars]
    info = core.DebugInfo("stopgrad_jax", "rule", None, None)
    effects = jaxpr.effects
    return Jaxpr((), invars, jaxpr.outvars, jaxpr.eqns, effects, info), list(consts)


def inputs_used(jaxpr: Any) -> list[bool]:
    """Tell of each input of a jaxpr whether a result is computed from it."""
    return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr in an equation's parameters, of whatever primitive."""
    return list(core.jaxprs_in_params(dict(params_of(eqn))))


def programs_in(eqn: Any) -> list[Any]:
    """Every jaxpr in an equation, also in the opaque object of a newer rule.

    That is in the parameter `_prim`, and holds jaxprs or what `jax.jit(f).trace` gives.
    """
    found = inner_jaxprs(eqn)
    for value in vars(_high(eqn) or types.SimpleNamespace()).values():
        traced = isinstance(value, jax.stages.Traced)
        value = value.jaxpr if traced else value
        if isinstance(value, Jaxpr | ClosedJaxpr):
            found.append(value)
    return found


def differentiated_in(eqn: Any) -> list[Any]:
    """Every jaxpr in an equation by whose derivative its own is made.

    A solver in it is none: `custom_linear_solve` and `custom_root` call what they are
    given, and differentiate the equation that it solves.
    """
    if eqn.primitive.name == "custom_linear_solve":
        jaxprs = eqn.params["jaxprs"]
        return [x for x in (jaxprs.matvec, jaxprs.vecmat) if x is not None]
    root = _high(eqn)
    if type(root).__name__ == "CustomRoot":
        _, guess, consts, _ = root.in_avals
        return [jax.make_jaxpr(root.f)(consts, guess)]
    return programs_in(eqn)


def held(jaxpr: Any) -> list[Any]:
    """Every constant that the programs in a jaxpr's equations hold.

    `inner_jaxprs` leaves the constants of a closed jaxpr away on JAX 0.10.
    """
    found = list[Any]()
    for eqn in opened(jaxpr)[0].eqns:
        for value in eqn.params.values():  # `cond` holds its branches in a tuple
            every = value if isinstance(value, tuple | list) else (value,)
            found += [x for v in every for x in getattr(v, "consts", ())]
        for program in programs_in(eqn):
            found += held(program)
    return found


def calls_back(jaxpr: Any) -> bool:
    """Tell a program that calls a function on the host and uses what it returns."""
    return any(
        eqn.primitive.name in ("pure_callback", "io_callback")
        or any(map(calls_back, programs_in(eqn)))
        for eqn in opened(jaxpr)[0].eqns
    )


def is_foreign(primitive: Any) -> bool:
    """Tell a primitive whose evaluation or derivative another library wrote."""
    functions = [primitive.impl, ad.primitive_jvps.get(primitive)]
    while functions:
        function = functions.pop()
        if isinstance(function, functools.partial):
            functions.append(function.func)
        code = getattr(function, "__code__", None)
        if code is not None and not is_own(code.co_filename):
            return True
    return False


def is_ref(aval: Any) -> bool:
    """Tell a mutable array reference (`jax.new_ref`) from a value."""
    return hasattr(aval, "inner_aval")


def jit_shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
    """Return the shardings a `jit` asks for its operands and results, or None each."""

    def asked(key: str) -> list[Any]:
        every = eqn.params[key]
        return [s if isinstance(s, jax.sharding.Sharding) else None for s in every]

    return asked("in_shardings"), asked("out_shardings")


def is_opaque(eqn: Any) -> bool:
    """Tell an equation that holds a program: ask where none is known to `control`."""
    name = eqn.primitive.name
    return name == "call_hi_primitive" or (bool(eqn.params) and any(inner_jaxprs(eqn)))


# With `jax_remat3`, `jax_custom_vjp3` and `jax_custom_jvp3` these are equations of one
# primitive, `call_hi_primitive`, around an object of JAX.
_HIGH = {
    "CheckpointName": "name",
    "CheckpointNameFwd": "name",
    "RematTraced": "remat2",
    "CustomJVPTraced": "custom_jvp_call",
    "CustomVJPTraced": "custom_vjp_call",
}


def _high(eqn: Any) -> Any:
    """Object of a `call_hi_primitive` of JAX's own, or None."""
    high = (
        eqn.params.get("_prim") if eqn.primitive.name == "call_hi_primitive" else None
    )
    return high if type(high).__module__.startswith("jax.") else None


def kind_of(eqn: Any) -> str:
    """Name what an equation is: its primitive, by its older name if it has two."""
    return _HIGH.get(type(_high(eqn)).__name__) or eqn.primitive.name


def params_of(eqn: Any) -> Mapping[str, Any]:
    """Parameters of an equation, by their older names."""
    high = _high(eqn)
    if high is None:
        return eqn.params
    traced = high.params.get("traced")
    inner = {"call_jaxpr": traced.jaxpr} if traced is not None else {}
    return inner | high.params


def scan_arity(eqn: Any) -> tuple[int, int]:
    """Return (number of constants, number of carries) of a scan equation.

    JAX 0.10 writes them down; from 0.11 they are read off the ranks: scanned
    operands and stacked results have one axis more than the body's.
    """
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    body, _ = opened(eqn.params["jaxpr"])

    def same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(o.aval.ndim == i.aval.ndim for o, i in pairs)

    num_carry = same_rank(eqn.outvars, body.outvars)
    return same_rank(eqn.invars, body.invars) - num_carry, num_carry


def jit_name(eqn: Any) -> str | None:
    """Name of the function a `jit` equation calls; None for any other equation."""
    return eqn.params["name"] if eqn.primitive.name == "jit" else None


def call_name(eqn: Any) -> str | None:
    """Name of the function a `jit` or custom-rule equation calls."""
    if eqn.primitive.name == "jit":
        return jit_name(eqn)
    if kind_of(eqn) in CUSTOM:
        debug_info = opened(params_of(eqn)["call_jaxpr"])[0].debug_info
        return debug_info.func_src_info.split(" at ")[0] if debug_info else None
    return None


def opaque_name(eqn: Any) -> str:
    """Name of the operation of an equation, also where that is an object of its own."""
    opaque = eqn.params.get("_prim") if kind_of(eqn) == "call_hi_primitive" else None
    return kind_of(eqn) if opaque is None else type(opaque).__name__


def edited_at(eqn: Any) -> str:
    """Address of the edit whose result an equation marks, or ""."""
    return eqn.params["address"] if eqn.primitive.name == "edited" else ""


def gate_name(eqn: Any) -> str:
    """Name of the public function that made a gate of ours, or ""."""
    return eqn.params["rule"].name if eqn.primitive.name == "gate" else ""


CUSTOM = ("custom_jvp_call", "custom_vjp_call")
NAMED = ("jit", *CUSTOM)  # what they call has a name of its own


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
    code = getattr(rule, "__code__", None)
    return rule is None or (code is not None and code.co_filename.startswith(OWN))


def custom_rule(eqn: Any) -> tuple[Any, ...] | None:
    """Return the user's functions behind a custom rule, to tell rules apart.

    JAX wraps a rule anew at every call, so two calls of `relu` hold different
    objects; the functions in their closures are the same. None: not found, and
    the caller must take every call for a different rule.
    """
    high, found = _high(eqn), list[Any]()
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


def returns_tree(eqn: Any) -> bool:
    """Tell what returns the arrays of whatever its function returns."""
    return eqn.primitive.name in ("jit", "scan")


def result_paths(eqn: Any) -> tuple[str, ...] | None:
    """Return where each result of a `jit` or `scan` is in what its function returns.

    `"[0]"` and so on; None where JAX does not tell. A result that is only handed
    through is missing.
    """
    if not returns_tree(eqn):
        return None
    debug_info = opened(eqn.params["jaxpr"])[0].debug_info
    paths = getattr(debug_info, "result_paths", None)
    if paths is None or len(paths) != len(eqn.outvars):
        return None
    return tuple(str(path).removeprefix("result") for path in paths)


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


# Traces -------------------------------------------------------------------------


def is_no_reverse(error: Exception) -> bool:
    """Tell JAX's refusal to differentiate a while loop backwards from other errors."""
    return isinstance(error, ValueError) and "Reverse-mode" in str(error)


# Arrays -------------------------------------------------------------------------


def mark(array: Any, owner: object) -> None:
    """Note on an array what owns it; copies and aliases have no mark.

    An attribute, where arrays can have one: a registry of weak references would take
    as long as the call of a compiled step. Without a mark an array is copied, not lost.
    """
    if isinstance(array, jax.Array) and not is_traced(array):
        with contextlib.suppress(AttributeError):
            array._stopgrad_jax_owner = owner  # type: ignore


def owner_of(array: Any) -> object | None:
    """Return what `mark` was last called with for this very array."""
    return getattr(array, "_stopgrad_jax_owner", None)


def is_key(x: Any) -> bool:
    """Tell a PRNG key, or another value of a dtype that NumPy does not have."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
