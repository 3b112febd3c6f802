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

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._reach.own_stop import is_handed

from .copies import Copies, Copy, Tokens, around
from .followed import constants, followed_twice, is_float, push_of, shifted
from .ignored import without_ignored
from .sought import Sought, is_left_out
from .tap import handed_on, instead, last_digit, still, tap, weighed, where_moved

# What the entries of an equation's token stand for.
TOLD, LEFT, RIGHT, NOISE = range(4)
# Instead of an id: the token of all equations, or of those inside a `with_backward`.
EVERY, INSIDE = -1, -2


class Interpreter(Sought):
    """Evaluates programs on copies; a subclass says on how many, and what for."""

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
        if name == "stop_gradient":
            return self.stop(eqn, copies)
        if not self.is_entered(eqn):
            return self.plain(eqn, copies, tokens)
        # A `with_backward` is a rule of its user's, and compared as one.
        if name == "gate" and _jax.gate_name(eqn) != "with_backward":
            return self.gate(eqn, copies)
        inner = control(eqn)
        if inner is None or id(eqn) in self.sites:
            return self.rule(eqn, copies, tokens)
        return around(self.run, inner, copies, tokens)

    def plain(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Evaluate an equation that is the same one in each copy."""
        outs = list[list[Any]]()
        for k, operands in enumerate(copies):
            # What has not moved is told by identity: a second array of the same numbers
            # would count as one that did.
            known = (outs[j] for j in range(k) if _same(copies[j], operands))
            out = next(known, None)
            outs.append(_jax.bind(eqn, *operands) if out is None else out)
        return outs

    def stop(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Keep what is stopped at the base."""
        if is_handed(eqn):  # the function of a `with_backward` does move
            base = _jax.bind(eqn, *copies[0])
            return [base, *(list(c) for c in copies[1:])]
        # JAX stops what its derivative passes by, as a factorization in `solve`.
        if _jax.is_of_jax(eqn) or id(eqn) in self.reading.freed:
            return [_jax.bind(eqn, *operands) for operands in copies]
        return [_jax.bind(eqn, *copies[0])] * len(copies)

    def gate(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Leave a gate out that is not linear; its values go on as they are."""
        assert is_left_out(eqn.params["rule"])
        return [_gated(eqn, c) for c in copies]

    def rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Evaluate an equation whose derivative somebody wrote."""
        raise NotImplementedError

    def valued(self, eqn: Any, base: Copy, out: list[Any]) -> list[Any]:
        """Give a result the value of the function, and the derivative of the rule."""
        if id(eqn) not in self.reading.valued:
            return out
        own = _function(eqn, constants(base))
        pairs = zip(out, own, strict=True)
        return [instead(x, y) if is_float(x) else y for x, y in pairs]


class Opened(Interpreter):
    """The program itself, in one copy, but for the gates that are left out."""

    moved = False

    def stop(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """There is nothing that it would keep from moving."""
        return [_jax.bind(eqn, *operands) for operands in copies]

    def rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Differentiate by the rule, at the value that the reading asks for."""
        (operands,) = copies
        return [self.valued(eqn, operands, _jax.bind(eqn, *operands))]


class Moved(Interpreter):
    """Two copies (base, moved), of which the moved one is differentiated by JAX.

    So factors and followed rules are those where it has moved to, and constants.
    """

    def gate(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Move by the factor where it has moved to."""
        return _by_factor(eqn, copies, copies[1])

    def rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Move as the rule says where it is followed, and as its function elsewhere."""
        if id(eqn) in self.reading.followed or self.hides(eqn):
            base = _jax.bind(eqn, *copies[0])
            return followed_twice(push_of(eqn, copies), copies, base)
        return [_function(eqn, c) for c in copies]


class Differenced(Interpreter):
    """Three copies (base, plus, minus), of which differences are taken.

    Factors and followed rules are those at the base, as a rule may jump.
    """

    def plain(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Evaluate an equation; quantized, it moves only if JAX's derivative does."""
        base, *moved = super().plain(eqn, copies, tokens)
        return [base, *self._quantized(base, moved, tokens)]

    def gate(self, eqn: Any, copies: Copies) -> list[list[Any]]:
        """Move by the factor at the base."""
        return _by_factor(eqn, copies, copies[0])

    def rule(self, eqn: Any, copies: Copies, tokens: Tokens) -> list[list[Any]]:
        """Hand the equation's share on, by the rule and by its function's differences.

        The base alone is differentiated: the rule is asked once, as `jax.grad` asks it.
        """
        key = id(eqn)
        if key in self.reading.held:
            copies = without_ignored(eqn, copies)
        base = copies[0]
        if key in tokens:
            base = self._moved_by(tokens[key][TOLD], eqn, copies)
        out = _jax.bind(eqn, *base)
        if key in self.reading.followed or self.hides(eqn):
            # Its share is what the token is told: as a difference it would count twice.
            here = constants(out)
            return [out, here, here]
        out = self.valued(eqn, copies[0], out)
        here = constants(out)
        moved = self._quantized(out, self._own(eqn, copies, here, tokens), tokens)
        if key in tokens:
            out = self._asked(tokens[key], out, here, moved)
        return [out, *moved]

    def _own(
        self, eqn: Any, copies: Copies, here: list[Any], tokens: Tokens
    ) -> list[list[Any]]:
        """Evaluate the function of a rule where the copies have moved to."""
        base, *moved = copies
        if id(eqn) not in self.reading.opened:
            return [here if _same(c, base) else _function(eqn, c) for c in moved]
        inner = control(eqn)
        assert inner is not None
        (body,) = inner.bodies
        # The base is a constant here: what it hands on is the rule's, and not this.
        start = [constants(base), *moved]
        return self.run(body.jaxpr, body.consts, start, tokens)[1:]

    def _quantized(
        self, out: list[Any], moved: list[list[Any]], tokens: Tokens
    ) -> list[list[Any]]:
        if not self.reading.quantized:
            return moved
        return [_still(out, there, tokens[EVERY]) for there in moved]

    def _moved_by(self, token: Any, eqn: Any, copies: Copies) -> list[Any]:
        """Let the operands of a rule move as the copies do, with the token."""
        first, end = 0, len(eqn.invars)
        if _jax.kind_of(eqn) == "gate":
            first = eqn.params["split"][0]
            end = first + eqn.params["split"][1]
        by = times if self.reading.forward else handed_on
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
            by = times if self.reading.forward else handed_on
            shift = by(token[LEFT], _difference(base, left))
            shift += by(token[RIGHT], _difference(right, base))
            weigh = times if self.reading.forward else weighed
            moved = (right != base) | (left != base)
            shift += weigh(token[NOISE], where_moved(moved, last_digit(base)))
            asked.append(tap(x, shift))
        return asked


def _by_factor(eqn: Any, copies: Copies, at: Copy) -> list[list[Any]]:
    """Let the values of a gate move as its sources do, times the factor at a copy."""
    rule, (count, sources) = eqn.params["rule"], eqn.params["split"]
    if is_left_out(rule):
        return [_gated(eqn, c) for c in copies]
    outs = [_jax.bind(eqn, *copies[0])]
    if not rule.linear:  # `prevent_gradient`: the base raises, should JAX get to it
        return [*outs, *(_gated(eqn, c) for c in copies[1:])]
    end = count + sources
    base = copies[0][count:end]
    values, source, factor = map(constants, (copies[0][:count], base, at[end:]))
    for there in (c[count:end] for c in copies[1:]):
        if _same(there, base):
            outs.append(constants(outs[0]))
            continue
        # A linear gate's pull is a factor, so it moves tangents as it does cotangents.
        pulled = rule.pull(_minus(there, source), factor)
        outs.append(list(map(shifted, values, pulled)))
    return outs


def _gated(eqn: Any, operands: Copy) -> list[Any]:
    """Return the values that a gate hands on."""
    return list(operands[: eqn.params["split"][0]])


def _function(eqn: Any, operands: Copy) -> list[Any]:
    """Evaluate the function that an equation's rule is for."""
    is_gate = _jax.kind_of(eqn) == "gate"
    return _gated(eqn, operands) if is_gate else _jax.bind(eqn, *operands)


def _still(here: Sequence[Any], there: Sequence[Any], token: Any) -> list[Any]:
    return [
        still(x, y, token) if is_float(x) and x is not y else y
        for x, y in zip(here, there, strict=True)
    ]


# Values -------------------------------------------------------------------------------


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
