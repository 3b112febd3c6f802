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
from jax.extend import core, source_info_util
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from .places import is_own

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
    for value in vars(high_of(eqn) or types.SimpleNamespace()).values():
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
    root = high_of(eqn)
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

    # JAX has an object for a sharding that nobody asked for; it is not public.
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


def high_of(eqn: Any) -> Any:
    """Object of a `call_hi_primitive` of JAX's own, or None."""
    # Another package may have such an object too, with any parameters.
    high = (
        eqn.params.get("_prim") if eqn.primitive.name == "call_hi_primitive" else None
    )
    return high if type(high).__module__.startswith("jax.") else None


def kind_of(eqn: Any) -> str:
    """Name what an equation is: its primitive, by its older name if it has two."""
    return _HIGH.get(type(high_of(eqn)).__name__) or eqn.primitive.name


def params_of(eqn: Any) -> Mapping[str, Any]:
    """Parameters of an equation, by their older names."""
    high = high_of(eqn)
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
