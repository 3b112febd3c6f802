"""Stops, gates and names whose result nobody uses: `stop_gradient(x)` on its own line.

Nothing in JAX is changed in place, so such a line does nothing, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._source.labels import Labels, Path, Spot

# What each would do; a gate is told by the public function that made it.
_DOES = {
    "stop_gradient": "stops",
    "name": "names",
    "prevent_gradient": "prevents",
    "per_example": "changes",
}


def dropped(jaxpr: Any, labels: Labels) -> list[tuple[Spot, str]]:
    """Return the user's expressions that do nothing, and what they would do.

    One of several leaves, or in a loop, counts if none of its results is used.
    """
    used, found = dict[Spot, bool](), dict[Spot, str]()
    for spot, does, is_used in _candidates(jaxpr, labels, labels.nowhere):
        used[spot] = used.get(spot, False) or is_used
        found[spot] = does
    return [(spot, does) for spot, does in found.items() if not used[spot]]


def _candidates(
    jaxpr: Any, labels: Labels, outer: Path
) -> Iterator[tuple[Spot, str, bool]]:
    # A variable can be read in its own jaxpr only.
    read = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
    for eqn in jaxpr.eqns:
        read.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    for eqn in jaxpr.eqns:
        inner, does = control(eqn), _does(eqn)
        path = labels.path(eqn, outer) if does or inner else outer
        if does and path.spots and not path.library:
            yield path.spots[-1], does, not read.isdisjoint(eqn.outvars)
        for body in inner.bodies if inner and not inner.rule else ():
            yield from _candidates(body.jaxpr, labels, path)


def _does(eqn: Any) -> str:
    name = _jax.kind_of(eqn)
    if name == "gate":
        return _DOES.get(_jax.gate_name(eqn), "changes")
    return _DOES.get(name, "")
