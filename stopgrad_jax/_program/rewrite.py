"""Evaluate a searched program with something done to the values that were found.

Only equations that hold a match are taken apart. All others run untouched, in whole
runs, so that custom rules, kernels, shardings and policies stay as they are.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._gate.summaries import summed

from .control import control
from .crossing import Slot
from .edits import (
    Edits,
    NamedEdits,
    behind,
    edited_operation,
    group_edits,
    operation,
    operation_edits,
    own_plan,
)
from .operations import Group
from .perturbation import hold, perturb, shift
from .plan import Found, Match, Plan
from .shared_runs import Runs
from .wiring import Extras


@dataclasses.dataclass(frozen=True)
class Actions:
    """What is done to a found value, by the positions of the addresses it matches.

    In this order: `edits` replace it, `holds` makes it a constant of the
    differentiation that owns the token, a perturbation is added, `captures` hands the
    value out. `once`: the perturbations are this call's own zeros, and no user's.
    `sums`: they are channels, see `_gate/summaries.py`.
    """

    edits: Edits = dataclasses.field(default_factory=dict)
    holds: frozenset[int] = frozenset()
    captures: frozenset[int] = frozenset()
    once: bool = True
    sums: bool = False

    def slot(self, found: Found) -> Slot:
        """Tell an equation that is made anew about a value inside it."""
        captured = not self.captures.isdisjoint(found.targets)
        return Slot(found.aval, captured, len(found.steps), self.sums)


class Rewriter:
    """Evaluates plans; what occurs many times is traced once, if that is `shared`."""

    def __init__(self, actions: Actions, shared: bool = True) -> None:
        self._actions = actions
        self._runs = Runs(shared)
        self._functions: dict[Any, Callable[..., Any]] = {}

    def run(
        self,
        plan: Plan,
        operands: Sequence[Any],
        perturbations: Sequence[Any],
        token: Any,
        eqns: Sequence[Any] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Evaluate a plan on `operands`.

        `perturbations` holds an array or None for each value found. Returns the
        results and, for each value found, the captured value or None. If only some
        `eqns` of the program are evaluated, results that need others are None.
        """
        jaxpr = plan.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, plan.consts, strict=True))
        env |= zip(jaxpr.invars, operands, strict=True)
        captured: list[Any] = [None] * len(plan.found)
        slices, end = {}, 0
        for match in plan.matches:
            start, end = end, end + len(match.inside) + len(match.own)
            slices[id(match.eqn)] = match, slice(start, end)
        edits = NamedEdits(self._actions.edits)

        called = _jax.as_called(jaxpr.eqns)
        wanted = jaxpr.eqns if eqns is None else eqns
        wanted, groups = self._replaced(plan, wanted)
        for run in self._runs.cut(wanted, {**slices, **groups}, jaxpr.outvars):
            # Before the run, which would read the old value of a leaf that is to be
            # edited.
            edits.check(run.reads)
            if id(run.eqns[0]) in groups:
                _, group, functions = groups[id(run.eqns[0])]
                env |= self._group(plan, group, functions, env, edits)
            elif id(run.eqns[0]) not in slices:
                values = [env[v] for v in run.reads]
                env |= zip(run.writes, self._runs.evaluate(run, values), strict=True)
            else:
                match, mine = slices[id(run.eqns[0])]
                operands = [_read(env, atom) for atom in match.eqn.invars]
                given = perturbations[mine]
                # In a run `evaluate` sees to this; an equation that is taken apart is
                # in none.
                run_as = called.get(id(match.eqn), match.eqn)
                same = operands, given, token
                out, captured[mine] = self._match(match, run_as, *same)
                env |= zip(match.eqn.outvars, out, strict=True)
                if match.own:
                    env |= edits.apply(match, out)
        return [_read(env, atom) for atom in jaxpr.outvars], captured

    def _replaced(
        self, plan: Plan, eqns: Sequence[Any]
    ) -> tuple[Sequence[Any], dict[int, tuple[Any, Group, list[Any]]]]:
        """Put one equation in the place of each edited operation of several.

        It is only read for what the operation reads and writes, and never run.
        """
        edited = group_edits(plan, self._actions.edits)
        if not edited:
            return eqns, {}
        places = {id(group.last): (group, functions) for group, functions in edited}
        inside = {id(eqn) for group, _ in edited for eqn in group.eqns}
        wanted, groups = [], {}
        for eqn in eqns:
            if id(eqn) in places:
                group, functions = places[id(eqn)]
                reads, writes = list(group.reads), list(group.writes)
                wanted.append(eqn.replace(invars=reads, outvars=writes))
                groups[id(wanted[-1])] = wanted[-1], group, functions
            elif id(eqn) not in inside:
                wanted.append(eqn)
        return wanted, groups

    def _group(
        self,
        plan: Plan,
        group: Group,
        functions: list[Any],
        env: Mapping[Any, Any],
        edits: NamedEdits,
    ) -> dict[Any, Any]:
        """Evaluate an edited operation of several equations."""
        own = own_plan(plan, group)

        def original(*operands: Any) -> list[Any]:
            none = [None] * len(own.found)
            return self.run(own, operands, none, None)[0]

        line = _jax.line_of(group.eqns[0])
        called = operation(original, group.reads, len(group.writes))
        operands = [env[v] for v in group.reads]
        same = functions, operands, group.writes
        with _jax.at_line_of(group.last):
            out = edited_operation(group.name, line, called, *same)
        new = dict(zip(group.writes, out, strict=True))
        for var, found in behind(plan, group):
            new |= edits.applied(found, group.last, var, new[var])
        return new

    def _match(
        self,
        match: Match,
        run_as: Any,
        operands: list[Any],
        perturbations: Any,
        token: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Evaluate an equation with what is done inside it and to its results.

        On the same operands, and with nothing done inside, `run_as` is run instead.
        """
        eqn, actions, split = match.eqn, self._actions, len(match.inside)
        inside, own = perturbations[:split], perturbations[split:]
        captured: list[Any] = [None] * split
        functions = operation_edits(match, actions.edits)
        busy = any(map(self._is_busy, match.inside, inside))
        given = list(operands)  # a rule may hold `original` for longer than these live

        def original(*new: Any) -> list[Any]:
            nonlocal captured
            if not busy:
                same = len(new) == len(given) and all(map(operator.is_, new, given))
                return _jax.bind(run_as if same else eqn, *new)
            with _jax.at_source_of(eqn):
                out, captured = self._rebuilt(match, list(new), inside, token)
            return out

        if functions:
            found = match.own[0]
            called = operation(original, eqn.invars, len(eqn.outvars))
            same = functions, operands, eqn.outvars
            with _jax.at_line_of(eqn):
                out = edited_operation(found.name, found.line, called, *same)
        else:
            out = original(*operands)
        done, captured = captured, []
        given.clear()
        for k, (found, perturbation) in enumerate(zip(match.own, own, strict=True)):
            # Held first: its own derivative is that of the perturbation, whatever it is
            # computed from.
            if token is not None and not actions.holds.isdisjoint(found.targets):
                out[k] = hold(out[k], token)
            if perturbation is not None and actions.sums:
                out[k] = summed(out[k], perturbation)
            elif perturbation is not None:
                move = perturb if actions.once else shift
                out[k] = move(out[k], perturbation)
            done.append(out[k] if actions.slot(found).captured else None)
        return out, done

    def _is_busy(self, found: Found, perturbation: Any) -> bool:
        actions = self._actions
        busy = {*actions.edits, *actions.holds, *actions.captures}
        return perturbation is not None or not busy.isdisjoint(found.targets)

    def _rebuilt(self, match: Match, operands: Any, given: Any, token: Any) -> Any:
        """Make an equation anew around bodies in which something is done."""
        slots = [[self._actions.slot(f) for f in plan.found] for plan in match.plans]
        inner, name = control(match.eqn), _jax.jit_name(match.eqn)
        assert inner is not None
        extras = Extras(slots, given, token)

        def call(k: int, operands: Any, perturbations: Any, token: Any) -> Any:
            function = self._function(match.plans[k], name)
            return function(list(operands), list(perturbations), token)

        # `jax.jit` takes shardings for all that goes in and comes out, and what goes
        # and leaves besides has none: so they are constraints here.
        if name is None:
            return inner.run(call, operands, extras)
        before, after = _jax.jit_shardings(match.eqn)
        operands = _constrained(operands, before)
        out, captured = inner.run(call, operands, extras)
        return _constrained(out, after), captured

    def _function(self, plan: Plan, name: str | None) -> Callable[..., Any]:
        """Return the plan as a function, jitted under `name` unless that is None."""
        key = (id(plan), name)
        if key not in self._functions:

            def function(operands: Any, perturbations: Any, token: Any) -> Any:
                return self.run(plan, operands, perturbations, token)

            # Printed programs, profiles and `sg.op` know the call by it.
            function.__name__ = name or "body"
            self._functions[key] = jax.jit(function) if name else function
        return self._functions[key]


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    pairs = zip(values, shardings, strict=True)
    constrain = jax.lax.with_sharding_constraint
    return [x if s is None else constrain(x, s) for x, s in pairs]


def _read(env: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, _jax.Literal) else env.get(atom)
