"""What in a program may be understood in more than one way."""

from __future__ import annotations

from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.own_stop import is_handed

from .measured import Weighed
from .sites import RuleSite


def known_sites(program: Weighed) -> tuple[set[int], set[int]]:
    """Return the rules of users that are met, and the samplers of JAX."""
    met = met_sites(program)
    drawn = {key for key, site in met.items() if site.draws and not site.is_users}
    return {k for k, s in met.items() if s.is_users} - drawn, drawn


def met_sites(program: Weighed) -> dict[int, RuleSite]:
    """Return the rules that are met: what is inside another one is its own."""
    # Two calls of a jitted function share one program: it is searched once.
    met, seen = dict[int, RuleSite](), set[int]()

    def search(jaxpr: Any) -> None:
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            site, inner = program.sites.get(id(eqn)), control(eqn)
            if site is not None:
                met[id(eqn)] = site
            elif inner is not None:
                for body in inner.bodies:
                    search(body.jaxpr)

    search(program.jaxpr)
    return met


def groups_of_stops(jaxpr: Any) -> list[frozenset[int]]:
    """Group the stops of a program by the function that made them; then all of them.

    A rule may take care of what its own library stops: a solver that is given a
    stopped factorization beside the matrix itself.
    """
    groups, seen = dict[Any, set[int]](), set[int]()

    def search(jaxpr: Any) -> None:
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            stops = _jax.kind_of(eqn) == "stop_gradient" and not is_handed(eqn)
            if stops and not _jax.is_of_jax(eqn):
                frames, _ = _jax.frames_of(eqn)
                last = frames[-1] if frames else None
                key = (last.file, last.function) if last else id(eqn)
                groups.setdefault(key, set()).add(id(eqn))
            for inner in _jax.programs_in(eqn):
                search(_jax.opened(inner)[0])

    search(jaxpr)
    found = [frozenset(group) for group in groups.values()]
    return [*found, frozenset().union(*found)] if len(found) > 1 else found
