"""Run a program one equation at a time, and open the equations that hold programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import Control, control
from stopgrad_jax._program.wiring import Body
from stopgrad_jax._source.labels import Labels
from stopgrad_jax._source.roles import COTANGENT, VALUE, is_backward, value_equations

from .devices import gathered
from .entries import Index
from .levels import Context, Executed, Failed, Level
from .shards import Shards


class Stepper:
    """Runs programs level by level, with the user's words for each operation."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels

    def top(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        operands: Sequence[Any],
        cotangents: int = 0,
        careful: bool = False,
    ) -> Level:
        """Run a whole program; the last of its operands are cotangents."""
        context = Context(self._labels.nowhere, careful=careful)
        live = [True] * len(jaxpr.outvars)
        first = len(operands) - cotangents
        flags = [k >= first for k in range(len(operands))]
        operands = [gathered(x) for x in operands]
        return self._flat(jaxpr, consts, operands, context, live, flags)

    def _flat(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        operands: Sequence[Any],
        context: Context,
        live: Sequence[bool],
        cotangents: Sequence[bool],
    ) -> Level:
        """Run a program; `live` tells which of its results are a part of the value."""
        level, shards = Level(context), context.shards
        if shards:
            consts = [shards.everywhere(x) for x in consts]
        pairs = enumerate(zip(operands, cotangents, strict=True))
        inputs = [level.add(x) for x in consts]
        inputs += [level.take(x, k, ct) for k, (x, ct) in pairs]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

        def number(atom: Any) -> int:
            if not isinstance(atom, _jax.Literal):
                return env[atom]
            literal = level.add(atom.val)
            level.literals.add(literal)
            return literal

        roles = value_equations(jaxpr, live) if not context.backward else {}
        called = _jax.as_called(jaxpr.eqns)
        for index, eqn in enumerate(jaxpr.eqns):
            reads = [number(atom) for atom in eqn.invars]
            role = VALUE if index in roles else ""
            back = context.backward and any(k in level.cotangents for k in reads)
            writes = level.run(
                self._run(called.get(id(eqn), eqn), shards),
                reads,
                eqn=eqn,
                path=self._labels.path(eqn, context.path),
                transforms=(*context.transforms, *_jax.transforms_of(eqn)),
                role=COTANGENT if back or is_backward(eqn) else role,
                lives=roles.get(index, [False] * len(eqn.outvars)),
            )
            env.update(zip(eqn.outvars, writes, strict=True))
        level.outputs = [[number(atom)] for atom in jaxpr.outvars]
        return level

    @staticmethod
    def _run(eqn: Any, shards: Shards | None) -> Callable[..., list[Any]]:
        run = functools.partial(_jax.bind, eqn)
        if shards:
            if eqn.primitive.name == "pvary":  # JAX has it in a `shard_map` only
                return lambda *operands: list(operands)
            types = [[v.aval for v in vs] for vs in (eqn.invars, eqn.outvars)]
            return shards.lifted(run, *types)
        inner = control(eqn)
        # By itself it would compile each of its operations for all devices.
        return jax.jit(run) if inner and inner.on_devices else run

    # Opening ------------------------------------------------------------------------

    def enter(
        self, level: Level, op: Executed, operands: Sequence[Any], near: Index = ()
    ) -> Level | None:
        """Open an operation of a level; None if there is nothing that can be opened.

        `near` is the entry that matters: of several shards, its own decides which
        branch is taken, and how often.
        """
        try:
            return self.inside(level, op, operands, near)
        except Failed:  # it runs, and not one by one what is in it: it is one operation
            return None

    def inside(
        self, level: Level, op: Executed, operands: Sequence[Any], near: Index = ()
    ) -> Level | None:
        """Open it as `enter` does, but raise `Failed` where an operation raises."""
        inner, context = control(op.eqn), level.context_of(op)
        if op.body is not None:
            return self._body(level, op, op.body, operands)
        if inner is None:
            return None
        if inner.loops:
            return self._loop(level, op, inner, operands, near)
        if inner.on_devices:
            if context.shards:
                return None
            shards = Shards(op.eqn)
            context = dataclasses.replace(context, shards=shards)
            operands = shards.split(operands)

        def lead(x: Any) -> Any:
            return _here(x, context, near)

        # What is no loop has one round.
        once = next(inner.rounds(operands, lambda x, _: x, lead))
        return self._body(level, op, inner.bodies[once.body], operands, context)

    def _body(
        self,
        level: Level,
        op: Executed,
        body: Body,
        operands: Sequence[Any],
        context: Context | None = None,
    ) -> Level:
        context, flags = context or level.context_of(op), level.flags(op)
        inside = op.body is None  # else it is a round, whose operands are the body's
        order = body.operands if inside else range(len(operands))
        inner = self._flat(
            body.jaxpr,
            body.consts,
            [operands[k] for k in order],
            context,
            op.lives,
            [flags[k] for k in order],
        )
        inner.given = {n: order[k] for n, k in inner.given.items()}
        return inner

    def _loop(
        self,
        level: Level,
        op: Executed,
        loop: Control,
        operands: Sequence[Any],
        near: Index,
    ) -> Level:
        """Run a loop round by round; what is carried are numbers of values."""
        inner, flags = Level(level.context_of(op)), level.flags(op)
        shards, depth = inner.context.shards, _depth(inner.context)
        runs = [self._jitted(body, shards) for body in loop.bodies]
        # What is scanned is taken step by step.
        numbers = [
            k if loop.is_scanned(k) else inner.take(x, k, flags[k])
            for k, x in enumerate(operands)
        ]

        def at(k: int, step: int) -> int:
            return inner.take(_step(operands[k], step, depth), k, flags[k])

        def lead(x: Any) -> Any:
            return _here(x, inner.context, near)

        rounds, results = loop.rounds(numbers, at, lead), None
        while True:
            try:
                now = rounds.send(results)
            except StopIteration as end:
                inner.outputs = end.value
                return inner
            body, run = loop.bodies[now.body], runs[now.body]
            if body.is_condition:
                results = run(*[inner.values[k] for k in now.operands])
            else:
                results = self._round(inner, op, run, body, now.operands, now.step)

    @staticmethod
    def _round(
        level: Level,
        op: Executed,
        run: Any,
        body: Body,
        reads: Sequence[int],
        step: int,
    ) -> list[int]:
        back = level.context.backward and any(k in level.cotangents for k in reads)
        same = {"eqn": op.eqn, "path": op.path, "transforms": op.transforms}
        role = COTANGENT if back else op.role
        same |= {"role": role, "lives": op.lives}
        return level.run(run, reads, body=body, step=step, **same)

    @staticmethod
    def _jitted(body: Body, shards: Shards | None) -> Callable[..., list[Any]]:
        jaxpr, consts = body.jaxpr, body.consts
        # Compiled once for all rounds, however many there are.
        run = jax.jit(lambda *operands: _jax.evaluate(jaxpr, consts, operands))
        types = [[v.aval for v in vs] for vs in (jaxpr.invars, jaxpr.outvars)]
        return shards.lifted(run, *types) if shards else run


def _depth(context: Context) -> int:
    return len(context.shards.sizes) if context.shards else 0


def _step(x: Any, step: int, depth: int) -> Any:
    """Return one step of what is scanned, below the axes of the mesh."""
    return x[(slice(None),) * depth + (step,)]


def _here(x: Any, context: Context, near: Index) -> Any:
    """Return a number of the shard that matters."""
    depth = _depth(context)
    x = np.asarray(x)
    return x[near[:depth]].flat[0] if depth and x.ndim else x.flat[0]
