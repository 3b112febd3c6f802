"""Make a traced program anew with a few equations changed: what parameters need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core.primitives import name_p

import stopgrad_jax._jax as _jax


def with_eqns(jaxpr: Any, eqns: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Return an open jaxpr with other equations and results."""
    return jaxpr.replace(eqns=list(eqns), outvars=list(outvars))


def map_jaxprs(eqn: Any, change: Callable[[Any], Any]) -> Any:
    """Replace each open jaxpr in an equation's parameters; itself if none changes."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple | list):
            new = [changed(x) for x in value]
            pairs = zip(new, value, strict=True)
            return value if all(a is b for a, b in pairs) else type(value)(new)
        if not isinstance(getattr(value, "jaxpr", value), _jax.Jaxpr):
            return value
        old, _ = _jax.opened(value)
        new = change(old)
        if new is old:
            return value
        return new if old is value else value.replace(jaxpr=new)

    # The same object where nothing changes: a jaxpr is known by its identity, and what
    # was traced of one is looked up by that.
    params = {key: changed(value) for key, value in eqn.params.items()}
    same = all(params[key] is value for key, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def reading(eqn: Any, others: Mapping[Any, Any]) -> Any:
    """Return an equation that reads other variables in place of its own."""
    atoms = [
        atom if isinstance(atom, _jax.Literal) else others.get(atom, atom)
        for atom in eqn.invars
    ]
    same = all(a is b for a, b in zip(atoms, eqn.invars, strict=True))
    return eqn if same else eqn.replace(invars=atoms)


def naming(var: Any, name: str, like: Any) -> Any:
    """Make an equation that names a variable, at the source line of another one."""
    new = core.Var(var.aval)
    params, place = {"name": name}, (like.source_info, like.ctx)
    return core.new_jaxpr_eqn([var], [new], name_p, params, frozenset(), *place)
