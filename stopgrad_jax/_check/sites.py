"""Equations whose derivative somebody wrote, and the names that they answer to."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._places import printed_place
from stopgrad_jax._program.control import control
from stopgrad_jax._source.labels import Labels

# What has the derivative of its mean, and not of the draw that is made.
_DRAWN = ("random_gamma",)
_RULES = ("call_hi_primitive", "custom_linear_solve", "linear_call", *_DRAWN)
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", *_DRAWN)


@dataclasses.dataclass(frozen=True, eq=False)
class RuleSite:
    """One such equation.

    Attributes:
      name: what it is called in messages; "" if it has none that tells anything.
      key: the name of the function alone.
      place: `file:line` of the function, or of the call if that is JAX's.
      names: all that it answers to.
      is_users: a rule that neither JAX nor this package wrote.
      draws: it draws at random, and again until it likes the draw.
      reverse_only: it has no derivative in forward mode.
    """

    eqn: Any
    name: str
    key: str
    place: str
    names: frozenset[str]
    is_users: bool
    draws: bool
    reverse_only: bool

    @property
    def shown(self) -> str:
        """The name and the place, as they are printed."""
        place = printed_place(self.place)
        name = self.name or "a custom rule"
        return f"{name} ({place})" if place else name

    def answers(self, names: frozenset[str]) -> bool:
        """Tell whether one of the names is one of its own."""
        return bool(names & {self.shown, *self.names})


Sites = Mapping[int, RuleSite]  # by the id of the equation


def sites_in(jaxpr: Any) -> dict[int, RuleSite]:
    """Find them in a program and in all that is nested in it."""
    found, seen, labels = dict[int, RuleSite](), set[int](), Labels()

    def search(jaxpr: Any) -> None:
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            if (site := _site(eqn, labels)) is not None:
                found[id(eqn)] = site
            for inner in _jax.programs_in(eqn):
                search(_jax.opened(inner)[0])

    search(jaxpr)
    return found


def best_name(site: RuleSite, sites: Sites) -> str:
    """Return what to write for a site: its name, if no other one answers to it."""
    others = {s.shown for s in sites.values() if site.key in s.names} - {site.shown}
    return site.key if site.key.isidentifier() and not others else site.shown


def _site(eqn: Any, labels: Labels) -> RuleSite | None:
    primitive, line = _jax.kind_of(eqn), _jax.line_of(eqn)
    if _jax.gate_name(eqn) == "with_backward":
        of = eqn.params["rule"].of
        names = frozenset({of, "with_backward"})
        return RuleSite(eqn, f"with_backward({of})", of, line, names, True, False, True)
    draws, users, place = primitive in _DRAWN, primitive not in _DRAWN, ""
    if primitive in _jax.CUSTOM:
        names, place, users = _custom(eqn, labels)
        draws = users and _rejects(
            _jax.opened(_jax.params_of(eqn)["call_jaxpr"])[0], False
        )
    elif primitive in _RULES or _jax.is_foreign(eqn.primitive):
        names = _called(eqn)
    else:
        return None
    if not place or _jax.is_own(place):  # a function of JAX with a rule of the user
        place = line
    name, reverse_only = names[0] if names else "", _jax.has_own_vjp(eqn)
    return RuleSite(
        eqn, name, name, place, frozenset(names), users, draws, reverse_only
    )


def _custom(eqn: Any, labels: Labels) -> tuple[list[str], str, bool]:
    """Names of a `custom_jvp` or `_vjp`, the best first; its place; is it the user's?

    Or another library's, that is: neither JAX's nor this package's.
    """
    name, place = _jax.call_name(eqn) or "", _jax.rule_site(eqn)
    file = place.rpartition(":")[0]
    names = [name] if name and not name.startswith("<unknown") else []
    rules = _jax.custom_rule(eqn) or ()
    if names and labels.is_users(file):
        # `jax.custom_gradient` of JAX 0.10 is called by the name of its wrapper.
        around = (f for rule in rules for f in _held(rule) if _place(f) == place)
        return [*(f.__name__ for f in around), *names], place, True
    # A wrapper in a library: the function it is around, if all that it closes over is
    # of one file.
    held = [f for rule in rules for f in _held(rule) if _is_from(f, file)]
    if len({f.__code__.co_filename for f in held}) == 1:
        return [held[0].__name__, *names], _place(held[0]), True
    if names and _jax.is_own(place):
        names.insert(0, name.lstrip("_"))
    codes = (getattr(f, "__code__", None) for f in _jax.custom_rule(eqn) or ())
    files = [file, *(code.co_filename for code in codes if code is not None)]
    # `lax.custom_root` of JAX 0.10: its rule is what the user's functions make of it.
    return names, place, name == "_custom_root" or not all(map(_jax.is_own, files))


def _place(function: Any) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _is_from(function: Any, file: str) -> bool:
    """Tell a function that is neither of a file nor of JAX."""
    other = function.__code__.co_filename
    return other != file and not _jax.is_own(other)


def _held(function: Any) -> list[types.FunctionType]:
    """Functions that a function closes over, itself or in an object of its own."""
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != types.CellType()]
    shared = type | types.ModuleType | types.FunctionType
    own = (x for x in held if hasattr(x, "__dict__") and not isinstance(x, shared))
    every = [*held, *(v for x in own for v in vars(x).values())]
    return [f for f in every if isinstance(f, types.FunctionType)]


def _called(eqn: Any) -> list[str]:
    """Names of an equation with a derivative that is no `custom_jvp` or `_vjp`."""
    if (opaque := eqn.params.get("_prim")) is None:
        return [_jax.kind_of(eqn)]
    infos = [_jax.opened(inner)[0].debug_info for inner in _jax.programs_in(eqn)]
    names = [info.func_src_info.split(" at ")[0] for info in infos if info]
    return [
        *(name for name in names if not name.startswith("<")),
        type(opaque).__name__,
    ]


def _rejects(jaxpr: Any, again: bool) -> bool:
    """Tell whether a program draws at random in a loop that ends as it likes."""
    for eqn in jaxpr.eqns:
        inner = control(eqn)
        looped = again or (inner is not None and inner.dynamic)
        if _jax.kind_of(eqn) in _DRAWN or (again and _jax.kind_of(eqn) in _RANDOM):
            return True
        if any(_rejects(_jax.opened(j)[0], looped) for j in _jax.programs_in(eqn)):
            return True
    return False
