"""The function whose plain derivative a program declares as its own.

A program is evaluated on several copies of its operands at once: the first is the point
at which it is differentiated, the *base*, the others are moved from it. What is stopped
stays at the base; a straight-through value moves as its source does; a linear gate
moves by its factor. The difference of two copies, over the distance, is then what JAX's
derivative ought to be.

The base is itself differentiated by JAX, and so each rule is asked what `jax.grad` asks
it and nothing else. At an equation with a rule, a *token* is differentiated by as well:
what comes to it is the equation's share of the whole derivative, as the rule says and
as the differences of its own function say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.own_stop import is_handed

from .copies import Copies, Copy, Tokens, around
from .followed import constant, followed_twice, is_float, push_of, shifted
from .ignored import without_ignored
from .sites import Sites
from .tap import handed, instead, last_digit, still, tap, weighed, where_moved

# What the entries of an equation's token stand for.
TOLD, LEFT, RIGHT, NOISE = range(4)
# Instead of an id: the token of all equations, or of those inside a `with_backward`.
EVERY, INSIDE = -1, -2


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


class Declared:
    """Evaluates programs on copies.

    With one copy, the program itself is evaluated, but for gates that are not linear:
    those are open. With two (base, moved), the moved one is differentiated: factors and
    followed rules are those where it has moved to, and constants. With three (base,
    plus, minus), for differences, they are those at the base, as a rule may jump.
    """

    def __init__(self, sites: Sites, reading: Reading) -> None:
        self.sites, self.reading = sites, reading
        self._special: dict[tuple[int, bool], bool] = {}
        self._entered: dict[tuple[int, bool], bool] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], copies: Copies, tokens: Tokens
    ) -> list[list[Any]]:
        """Return the results of each copy."""
        envs, consts = list[dict[Any, Any]](), list(map(_array, consts))
        for operands in copies:
            env = dict(zip(jaxpr.constvars, consts, strict=True))
            envs.append(env | dict(zip(jaxpr.invars, operands, strict=True)))

        def read(env: dict[Any, Any], atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [[read(env, atom) for atom in eqn.invars] for env in envs]
            results = self.equation(eqn, operands, tokens)
            for env, out in zip(envs, results, strict=True):
                env.update(zip(eqn.outvars, out, strict=True))
        return [[read(env, atom) for atom in jaxpr.outvars] for env in envs]

    def equation(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Return an equation's results in each copy."""
        name = _jax.kind_of(eqn)
        if name == "stop_gradient" and len(copies) > 1:
            return self._stop(eqn, copies)
        if not self._is_entered(eqn, len(copies) > 1):
            return self._plain(eqn, copies, tokens)
        if name == "gate":
            return self._gate(eqn, copies, tokens)
        inner = control(eqn)
        if inner is None or id(eqn) in self.sites:
            return self._rule(eqn, copies, tokens)
        return around(self.run, inner, copies, tokens)

    def out_of_reach(self, jaxpr: Any) -> set[int]:
        """Find equations with a stop or a gate in them where nobody gets at it."""
        found = set[int]()
        for eqn in jaxpr.eqns:
            inner = control(eqn)
            if not self._is_special(eqn, True) or _jax.kind_of(eqn) in _SINGLE:
                continue
            if inner is None or id(eqn) in self.sites:
                found |= {id(eqn)} if self._hides(eqn) else set()
            else:
                for body in inner.bodies:
                    found |= self.out_of_reach(body.jaxpr)
        return found

    # What is more than the same equation in each copy -------------------------------

    def _is_entered(self, eqn: Any, moved: bool) -> bool:
        """Tell whether an equation is not evaluated as it is, in each copy."""
        key = (id(eqn), moved)
        if key not in self._entered:
            around = moved and self._is_around(eqn)
            self._entered[key] = around or self._is_special(eqn, moved)
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
            return self.reading.forward or not inner.dynamic
        below = _equations(_jax.programs_in(eqn))
        return any(self._is_entered(e, True) for e in below)

    def _is_special(self, eqn: Any, moved: bool) -> bool:
        """Tell whether an equation is a stop, gate or asked rule, or holds one."""
        name = _jax.kind_of(eqn)
        if name == "stop_gradient":  # what JAX stops, its derivative passes by
            return moved and not (is_handed(eqn) or _jax.is_of_jax(eqn))
        # The values of a `with_backward` move as its function does, as those of a rule.
        if name == "gate" and eqn.params["rule"].name != "with_backward":
            return moved or _is_open(eqn.params["rule"])
        if self._is_met(eqn, moved):
            return True
        if control(eqn) is None or id(eqn) in self.sites:
            return self._hides(eqn, moved)
        return self.holds_special(eqn, moved)

    def _is_met(self, eqn: Any, moved: bool) -> bool:
        """Tell a rule that the reading says something of."""
        reading = self.reading
        said = reading.asked | reading.followed | reading.opened
        return id(eqn) in reading.valued or (moved and id(eqn) in said)

    def _hides(self, eqn: Any, moved: bool = True) -> bool:
        """Tell what holds a stop or a gate where nobody gets at it.

        What is in a rule of the user is its author's own.
        """
        site = self.sites.get(id(eqn))
        if site is not None and site.is_users and _jax.kind_of(eqn) in _jax.CUSTOM:
            return False
        return _jax.kind_of(eqn) not in _SINGLE and self.holds_special(eqn, moved)

    def holds_special(self, eqn: Any, moved: bool = True) -> bool:
        """Tell whether there is a stop, a gate or an asked rule inside an equation."""
        key = (id(eqn), moved)
        if key not in self._special:
            inner = _equations(_jax.differentiated_in(eqn))
            self._special[key] = any(self._is_special(e, moved) for e in inner) or (
                self._holds_met(eqn, moved)
            )
        return self._special[key]

    def _holds_met(self, eqn: Any, moved: bool) -> bool:
        """Tell whether a rule that the reading says something of is inside another."""
        return any(
            self._is_met(e, moved) or self._holds_met(e, moved)
            for e in _equations(_jax.programs_in(eqn))
        )

    def _plain(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        outs = list[list[Any]]()
        for k, operands in enumerate(copies):
            known = (outs[j] for j in range(k) if _same(copies[j], operands))
            out = next(known, None)
            outs.append(_jax.bind(eqn, *operands) if out is None else out)
        if self.reading.quantized and len(outs) > 1:
            outs[1:] = [_still(outs[0], out, tokens[EVERY]) for out in outs[1:]]
        return outs

    def _stop(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        if is_handed(eqn):  # the function of a `with_backward` does move
            base = _jax.bind(eqn, *copies[0])
            return [base, *(list(c) for c in copies[1:])]
        # JAX stops what its derivative passes by, as a factorization in `solve`.
        if _jax.is_of_jax(eqn) or id(eqn) in self.reading.freed:
            return [_jax.bind(eqn, *operands) for operands in copies]
        return [_jax.bind(eqn, *copies[0])] * len(copies)

    def _gate(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        rule, (count, sources) = eqn.params["rule"], eqn.params["split"]
        end = count + sources
        if rule.name == "with_backward":
            return self._rule(eqn, copies, tokens)
        if _is_open(rule):
            return [list(c[:count]) for c in copies]
        outs = [_jax.bind(eqn, *copies[0])]
        if not rule.linear:
            return [*outs, *(list(c[:count]) for c in copies[1:])]
        values, source, parameters = map(
            constant, (copies[0][:count], copies[0][count:end], copies[-1][end:])
        )
        if len(copies) == 3:
            parameters = constant(copies[0][end:])
        for c in copies[1:]:
            there = c[count:end]
            if _same(there, copies[0][count:end]):
                outs.append(constant(outs[0]))
                continue
            pulled = rule.pull(_minus(there, source), parameters)
            outs.append(list(map(shifted, values, pulled)))
        return outs

    # Rules ----------------------------------------------------------------------------

    def _rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        reading, key = self.reading, id(eqn)
        followed = key in reading.followed or self._hides(eqn)
        if len(copies) == 1:
            return [self._valued(eqn, copies[0], _jax.bind(eqn, *copies[0]))]
        if len(copies) == 2:
            if followed:
                base = _jax.bind(eqn, *copies[0])
                return followed_twice(push_of(eqn, copies), copies, base)
            return [_function(eqn, c) for c in copies]
        if key in reading.held:
            copies = without_ignored(eqn, copies)
        base = copies[0]
        if key in tokens:
            base = self._moved_by(tokens[key][TOLD], eqn, copies)
        out = _jax.bind(eqn, *base)
        if followed:
            here = constant(out)
            return [out, here, here]
        out = self._valued(eqn, copies[0], out)
        here = constant(out)
        moved = [here if _same(c, copies[0]) else _function(eqn, c) for c in copies[1:]]
        if key in reading.opened:
            inner = control(eqn)
            assert inner is not None
            (body,) = inner.bodies
            start = [constant(copies[0]), *copies[1:]]
            moved = self.run(body.jaxpr, body.consts, start, tokens)[1:]
        if reading.quantized:
            moved = [_still(out, there, tokens[EVERY]) for there in moved]
        if key in tokens:
            out = self._asked(tokens[key], out, here, moved)
        return [out, *moved]

    def _valued(self, eqn: Any, base: Copy, out: list[Any]) -> list[Any]:
        """Give a result the value of the function, and the derivative of the rule."""
        if id(eqn) not in self.reading.valued:
            return out
        own = _function(eqn, constant(base))
        pairs = zip(out, own, strict=True)
        return [instead(x, y) if is_float(x) else y for x, y in pairs]

    def _moved_by(self, token: Any, eqn: Any, copies: Copies) -> list[Any]:
        """Let the operands of a rule move as the copies do, with the token."""
        first, end = 0, len(eqn.invars)
        if _jax.kind_of(eqn) == "gate":
            first = eqn.params["split"][0]
            end = first + eqn.params["split"][1]
        by = times if self.reading.forward else handed
        base = list(copies[0])
        for k, (x, plus, minus) in enumerate(zip(*copies, strict=True)):
            if first <= k < end and is_float(x) and not (plus is x and minus is x):
                half = jnp.asarray(0.5, jnp.result_type(x))
                base[k] = tap(x, by(token, half * _difference(plus, minus)))
        return base

    def _asked(
        self, token: jax.Array, out: list[Any], here: list[Any], moved: list[list[Any]]
    ) -> list[Any]:
        """Hand the differences of a function on where its derivative goes."""
        (plus, minus), asked = moved, list[Any]()
        for x, base, right, left in zip(out, here, plus, minus, strict=True):
            if not is_float(x) or (right is base and left is base):
                asked.append(x)
                continue
            by = times if self.reading.forward else handed
            shift = by(token[LEFT], _difference(base, left))
            shift += by(token[RIGHT], _difference(right, base))
            weigh = times if self.reading.forward else weighed
            moved = (right != base) | (left != base)
            shift += weigh(token[NOISE], where_moved(moved, last_digit(base)))
            asked.append(tap(x, shift))
        return asked


def _equations(jaxprs: Sequence[Any]) -> Iterator[Any]:
    return (eqn for jaxpr in jaxprs for eqn in _jax.opened(jaxpr)[0].eqns)


def _function(eqn: Any, operands: Copy) -> list[Any]:
    """Evaluate the function that an equation's rule is for."""
    if _jax.kind_of(eqn) == "gate":
        return list(operands[: eqn.params["split"][0]])
    return _jax.bind(eqn, *operands)


def _still(here: Sequence[Any], there: Sequence[Any], token: Any) -> list[Any]:
    return [
        still(x, y, token) if is_float(x) and x is not y else y
        for x, y in zip(here, there, strict=True)
    ]


_SINGLE = ("stop_gradient", "gate")  # what is special by itself


# Values -------------------------------------------------------------------------------


def _is_open(rule: Any) -> bool:
    """Tell a gate that is left out of the comparison: clip, norm, transform, ..."""
    forced = rule.name in ("with_backward", "prevent_gradient")
    return not rule.linear and not forced


def _same(there: Copy, here: Copy) -> bool:
    return all(a is b for a, b in zip(there, here, strict=True))


def _array(x: Any) -> Any:
    """Return a constant as whoever traces it has it: a rule may index with tracers."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _minus(there: Copy, here: Copy) -> list[Any]:
    return [a - b for a, b in zip(there, here, strict=True)]


def _difference(there: Any, here: Any) -> jax.Array:
    """Return a difference; none between what is infinite in the same way."""
    here = jnp.asarray(here, jnp.result_type(there))
    return jnp.where(there == here, jnp.zeros_like(here), there - here)


def times(token: Any, x: Any) -> jax.Array:
    return token.astype(x.dtype) * x
