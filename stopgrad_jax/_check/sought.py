"""Which equations of a program are more than the same equation in each copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.own_stop import is_handed

from .sites import Sites

_SINGLE = ("stop_gradient", "gate")  # what is special by itself


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a program is to be understood; equations are given by their ids.

    Attributes:
      asked: the rules that are compared with their functions.
      followed: those that are taken at their word: what they return stays at the base,
        and their share of the derivative is what they say.
      opened: those whose function is itself understood as the program is.
      freed: stops that are none: a rule takes care of them.
      valued: those whose value at the base is that of their function.
      held: rules that are compared by what their functions use alone.
      quantized: where JAX's derivative is zero, values stay at the base, too.
      forward: the derivative is taken in forward mode.
    """

    asked: frozenset[int] = frozenset()
    followed: frozenset[int] = frozenset()
    opened: frozenset[int] = frozenset()
    freed: frozenset[int] = frozenset()
    valued: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    quantized: bool = False
    forward: bool = False


class Sought:
    """Tells the stops, the gates and the rules that a reading says something of.

    What holds one is looked into, wherever somebody can get at it. With one copy
    nothing has `moved`, and what is special is what changes the value at the base.
    """

    moved = True

    def __init__(self, sites: Sites, reading: Reading) -> None:
        self.sites, self.reading = sites, reading
        # An equation is asked again by every program around it: it answers once.
        self._holding: dict[int, bool] = {}
        self._entered: dict[int, bool] = {}

    def is_entered(self, eqn: Any) -> bool:
        """Tell whether an equation is not evaluated as it is, in each copy."""
        key = id(eqn)
        if key not in self._entered:
            around = self.moved and self._is_around(eqn)
            self._entered[key] = around or self.is_special(eqn)
        return self._entered[key]

    def _is_around(self, eqn: Any) -> bool:
        """Tell what has to be looked into although it hides nothing.

        The function of a `with_backward` does move; and to see where JAX's derivative
        is zero, all that is nested is looked into.
        """
        if is_handed(eqn) or _jax.gate_name(eqn) == "with_backward":
            return True
        inner = control(eqn)
        if inner is None or id(eqn) in self.sites:
            return False
        if self.reading.quantized:
            # Its tokens are differentiated by, and JAX has no reverse mode of a
            # `while_loop`: there, one is left as it is.
            return self.reading.forward or not inner.dynamic
        below = _equations(_jax.programs_in(eqn))
        return any(self.is_entered(e) for e in below)

    def is_special(self, eqn: Any) -> bool:
        """Tell whether an equation is a stop, gate or asked rule, or holds one."""
        name = _jax.kind_of(eqn)
        if name == "stop_gradient":  # what JAX stops, its derivative passes by
            return self.moved and not (is_handed(eqn) or _jax.is_of_jax(eqn))
        # The values of a `with_backward` move as its function does, as those of a rule.
        if name == "gate" and _jax.gate_name(eqn) != "with_backward":
            return self.moved or is_left_out(eqn.params["rule"])
        if self._is_met(eqn):
            return True
        if control(eqn) is None or id(eqn) in self.sites:
            return self.hides(eqn)
        return self.holds_special(eqn)

    def _is_met(self, eqn: Any) -> bool:
        """Tell a rule that the reading says something of."""
        reading = self.reading
        said = reading.asked | reading.followed | reading.opened
        return id(eqn) in reading.valued or (self.moved and id(eqn) in said)

    def hides(self, eqn: Any) -> bool:
        """Tell what holds a stop or a gate where nobody gets at it.

        What is in a rule of the user is its author's own.
        """
        site = self.sites.get(id(eqn))
        if site is not None and site.is_users and _jax.kind_of(eqn) in _jax.CUSTOM:
            return False
        return _jax.kind_of(eqn) not in _SINGLE and self.holds_special(eqn)

    def holds_special(self, eqn: Any) -> bool:
        """Tell whether there is a stop, a gate or an asked rule inside an equation."""
        key = id(eqn)
        if key not in self._holding:
            inner = _equations(_jax.differentiated_in(eqn))
            special = any(map(self.is_special, inner))
            self._holding[key] = special or self._holds_met(eqn)
        return self._holding[key]

    def _holds_met(self, eqn: Any) -> bool:
        """Tell whether a rule that the reading says something of is inside another."""
        return any(
            self._is_met(e) or self._holds_met(e)
            for e in _equations(_jax.programs_in(eqn))
        )

    def out_of_reach(self, jaxpr: Any) -> set[int]:
        """Find equations with a stop or a gate in them where nobody gets at it."""
        found = set[int]()
        for eqn in jaxpr.eqns:
            inner = control(eqn)
            if not self.is_special(eqn) or _jax.kind_of(eqn) in _SINGLE:
                continue
            if inner is None or id(eqn) in self.sites:
                found |= {id(eqn)} if self.hides(eqn) else set()
            else:
                for body in inner.bodies:
                    found |= self.out_of_reach(body.jaxpr)
        return found


def is_left_out(rule: Any) -> bool:
    """Tell a gate that is left out of the comparison: clip, norm, transform, ..."""
    forced = rule.name in ("with_backward", "prevent_gradient")
    return not rule.linear and not forced


def _equations(jaxprs: Sequence[Any]) -> Iterator[Any]:
    return (eqn for jaxpr in jaxprs for eqn in _jax.opened(jaxpr)[0].eqns)
