"""Spell a program out as one graph: every nested jaxpr where it is called."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import Control
from stopgrad_jax._program.search import Found, Plan
from stopgrad_jax._program.wiring import Body
from stopgrad_jax._source.labels import Labels, Path

from .decided import Decided
from .derivative_rules import Answer, Rules, chosen
from .fed import feeds_of
from .graph import Graph, Node, Operation
from .overwrites import Overwrites
from .reach import Bits, Moves, Reach, read
from .references import carries, fed_back, is_about_refs, reads_and_writes, refs_of


def unfold(
    jaxpr: Any,
    labels: Labels,
    plan: Plan | None = None,
    held: Callable[[Found], bool] = lambda found: False,
    moved: Sequence[Bits] | None = None,
    needed: Iterable[int] | None = None,
) -> Graph:
    """Return the graph of a program, with the values that a plan found in it.

    Nothing is connected to a found value that is `held` but what follows it. `moved`
    holds, for each input and each found value, the sources (as bits) that it moves
    with; all move together, if it is None. Only rules of the `needed` equations, by
    number, are asked, if given.
    """
    decided = Decided()
    jaxpr = decided.program(jaxpr)
    unfolding = _Unfolding(labels, held, jaxpr, needed, decided)
    graph = unfolding.graph
    moves = moved or [1] * len(jaxpr.invars)
    graph.inputs = [
        unfolding.value(v.aval, -1, (), (), bool(bits))
        for v, bits in zip(jaxpr.invars, moves, strict=False)
    ]
    inputs = graph.inputs
    graph.outputs, _ = unfolding.inline(jaxpr, inputs, labels.nowhere, plan, moved)
    return graph


@dataclasses.dataclass(frozen=True)
class _Spelled:
    """A body in the graph: what it returns, and what its references hold then.

    `joints` stand, by the number of the input, for what a loop carries into a round.
    """

    body: Body
    results: list[Node | None]
    refs: list[Node | None]
    joints: Mapping[int, Node]


class _Unfolding:
    def __init__(
        self,
        labels: Labels,
        held: Callable[[Found], bool],
        jaxpr: Any,
        needed: Iterable[int] | None,
        decided: Decided,
    ) -> None:
        self.graph, self._decided = Graph(), decided
        self._idle: set[int] = set()
        self._within: tuple[Any, ...] = ()
        # Of the outermost program: those inside of others are asked in any case.
        if needed is not None:
            self._idle = set(map(id, jaxpr.eqns))
            self._idle -= {id(jaxpr.eqns[k]) for k in needed}
        self._moves = bytearray()  # for each value, whether a source may move it
        self._labels, self._held = labels, held
        self._rules, self._overwrites = Rules(), Overwrites()
        moves = Moves(self._rules.moving, held)
        self._reach = Reach(self._rules, held, moves, self._rules.by_pattern)

    def value(
        self,
        aval: Any,
        maker: int,
        grads: Sequence[Node],
        feeds: Sequence[Node],
        moves: bool = False,
    ) -> Node:
        """Add a value."""
        self._moves.append(moves or any(self._moves[v] for v in grads))
        self.graph.avals.append(aval)
        self.graph.maker.append(maker)
        self.graph.grads.append(grads)
        self.graph.feeds.append(feeds)
        return len(self.graph.maker) - 1

    def _op(self, eqn: Any, path: Path, join: bool = False) -> Operation:
        op = Operation(eqn, path, join)
        op.within = self._within
        self.graph.ops.append(op)
        return op

    def _result(
        self, op: Operation, aval: Any, grads: Iterable[Any], feeds: Iterable[Any]
    ) -> Node:
        by_tangent = _values(grads) if carries(aval) else ()
        value = self.value(aval, len(self.graph.ops) - 1, by_tangent, _values(feeds))
        op.values.append(value)
        return value

    def inline(
        self,
        jaxpr: Any,
        operands: Sequence[Any],
        outer: Path,
        plan: Plan | None,
        moved: Sequence[Bits] | None,
    ) -> tuple[list[Node | None], list[Node | None]]:
        """Add a jaxpr's operations; return its results, and what its refs hold then."""
        env: dict[Any, Node | None] = dict(zip(jaxpr.invars, operands, strict=True))
        matches = {m.index: m for m in plan.matches} if plan else {}
        jaxpr = self._decided.program(jaxpr)
        overwritten = self._overwrites(jaxpr, plan)
        flags, start = self._reach.moving(jaxpr, plan, moved), len(jaxpr.invars)

        def value_of(atom: Any) -> Node | None:
            return None if isinstance(atom, _jax.Literal) else env.get(atom)

        for index, eqn in enumerate(jaxpr.eqns):
            path = self._labels.path(eqn, outer)
            inputs = [value_of(atom) for atom in eqn.invars]
            match = matches.get(index)
            inner, split = self._decided.control(eqn), len(match.inside) if match else 0
            moving = None if moved is None else [read(flags, a) for a in eqn.invars]
            if inner is not None and not inner.rule:
                plans = (match.plans if match else ()) or (None,) * len(inner.bodies)
                own = None if moved is None else moved[start : start + split]
                bodies = self._bodies(eqn, path, inputs, inner, plans, (moving, own))
                results, refs = self._nested(eqn, path, inputs, inner, bodies)
                env.update((eqn.invars[k], value) for k, value in refs.items())
            elif is_about_refs(eqn):
                results = self._reference(eqn, path, inputs, env)
                self.graph.found += [None] * split
            else:
                sources = overwritten.get(index)
                kept = None if sources is None else [value_of(v) for v in sources]
                results = self._equation(eqn, path, inputs, kept, moving)
                self.graph.found += [None] * split
            for k, own in enumerate(match.own if match else ()):
                if results[k] is None:  # no input comes here, but it is asked about
                    results[k] = self._result(self._op(eqn, path), own.aval, (), ())
                if self._held(own):
                    results[k] = self._stop(eqn, path, results[k])
                elif inner is not None and not inner.rule and not inner.joins:
                    results[k] = self._returned(eqn, path, results[k])
                found = results[k]
                if found is not None:
                    own_bits = moved is None or moved[start + split + k]
                    self._moves[found] = bool(self._moves[found] or own_bits)
                self.graph.found.append(found)
            start += split + (len(match.own) if match else 0)
            env.update(zip(eqn.outvars, results, strict=True))
        left = [env[jaxpr.invars[k]] for k in refs_of(jaxpr)]
        return [value_of(atom) for atom in jaxpr.outvars], left

    def _equation(
        self,
        eqn: Any,
        path: Path,
        inputs: Sequence[Any],
        kept: Sequence[Any] | None,
        moving: Sequence[Bits] | None,
    ) -> list[Node | None]:
        # `jnp.where(True, x, y)`: what is not chosen feeds nothing.
        if (case := chosen(eqn)) is not None:
            inputs = [x if k == case else None for k, x in enumerate(inputs)]
        if not any(x is not None for x in inputs):
            return [None] * len(eqn.outvars)
        op = self._op(eqn, path)
        op.inputs = inputs
        moves = any(self._moves[x] for x in inputs if x is not None)
        # Of what leads nowhere JAX runs the forward half of a rule, which may raise.
        wanted = 0 if id(eqn) in self._idle else None
        if not moves:
            answer = Answer([0] * len(eqn.outvars))
        elif self._rules.by_pattern(eqn):
            answer, op.refuses = self._rules.by_source(eqn, moving, wanted)
            op.is_told, op.moving = True, moving
        else:
            answer = self._rules.answer(eqn, None, wanted)
            op.refusing = [x for k, x in enumerate(inputs) if answer.refuses >> k & 1]
        op.masks, op.always = answer.masks, answer.always
        if _jax.gate_name(eqn) == "prevent_gradient":
            op.refusing = inputs
        passes = answer.dependence
        if wanted == 0 and moves:  # nothing comes back, and what reads it moves
            passes = self._rules.moving(eqn)
        op.overwrites = kept is not None
        results: list[Node | None] = []
        feeds = feeds_of(self.graph, eqn, inputs, answer)
        for var, bits, fed in zip(eqn.outvars, passes, feeds, strict=True):
            grads = [x for k, x in enumerate(inputs) if bits >> k & 1]
            if kept is not None:
                grads = kept
            results.append(self._result(op, var.aval, grads, fed))
            if moves and carries(var.aval) and _jax.has_own_vjp(eqn):
                self.graph.moves[op.values[-1]] = _values(inputs)
                self._moves[op.values[-1]] = True
        if eqn.primitive.name == "select_n" and case is None:
            self.graph.cases[op.values[0]] = inputs[1:]
        # Without results, as of `jax.debug.print`, it reads its operands all the same.
        if not results:
            self._result(op, None, (), inputs)
        return results[: len(eqn.outvars)]

    def _stop(self, eqn: Any, path: Path, value: Node | None) -> Node | None:
        """A value that is held: the same, with nothing behind it."""
        if value is None:
            return None
        op = self._op(eqn, path)
        op.held = True
        return self._result(op, self.graph.avals[value], (), (value,))

    def _returned(self, eqn: Any, path: Path, value: Node | None) -> Node | None:
        """A found value that a body returned, apart from what the body does with it.

        The body may read it, too, return it twice, or have been given it.
        """
        if value is None:
            return None
        op = self._op(eqn, path, join=True)
        op.copies = True
        return self._result(op, self.graph.avals[value], (value,), (value,))

    def _reference(
        self, eqn: Any, path: Path, inputs: Sequence[Any], env: dict[Any, Any]
    ) -> list[Node | None]:
        op = self._op(eqn, path)
        reads, writes = reads_and_writes(eqn)
        held, written = [inputs[k] for k in reads], [inputs[k] for k in writes]
        results = [self._result(op, v.aval, held, inputs) for v in eqn.outvars]
        for var, made in zip(eqn.outvars, results, strict=True):
            if _jax.is_ref(var.aval):  # JAX differentiates by what it holds in any case
                self.graph.moves[made] = (*_values(inputs), *self.graph.inputs)
        for atom in eqn.invars:
            if _jax.is_ref(atom.aval) and writes != [0]:
                env[atom] = self._result(op, atom.aval, written, written)
        return list(results)

    def _nested(
        self,
        eqn: Any,
        path: Path,
        inputs: Sequence[Any],
        inner: Control,
        bodies: Iterable[_Spelled],
    ) -> tuple[list[Node | None], dict[int, Node | None]]:
        """Return the results of an equation, and what references hold after it.

        Each is the value that a body returns; where it may be one of several, a joint.
        """
        sources: list[list[Node | None]] = [[] for _ in eqn.outvars]
        left: dict[int, list[Node | None]] = {}
        steering = [inputs[0]] if inner.decides == "branch" else []
        for spelled in bodies:
            body, joints = spelled.body, spelled.joints
            if body.is_condition:
                steering += spelled.results
            for k, value in zip(body.results, spelled.results, strict=True):
                if k is not None and not inner.is_empty:
                    sources[k].append(value)
            for back, value in zip(refs_of(body.jaxpr), spelled.refs, strict=True):
                # A condition carries nothing of its own: no joint stands for its ref.
                before = joints.get(back, inputs[body.operands[back]])
                start = [before] if inner.may_run_no_round else []
                left.setdefault(body.operands[back], []).extend([value, *start])
            for out, back in body.feedback if inner.may_run_no_round else ():
                if (k := body.results[out]) is not None:
                    sources[k].append(joints[back])
        if not inner.joins:
            return [only for (only,) in sources], {k: x for k, (x,) in left.items()}
        op = self._op(eqn, path, join=True)
        if inner.dynamic:  # a while loop has no reverse mode
            op.refusing = inputs
        results: list[Node | None] = [
            self._result(op, var.aval, values, [*values, *steering])
            for var, values in zip(eqn.outvars, sources, strict=True)
        ]
        if inner.decides == "branch":
            self.graph.cases.update(zip(op.values, sources, strict=True))
        return results, {
            k: self._result(op, eqn.invars[k].aval, values, [*values, *steering])
            for k, values in left.items()
        }

    def _bodies(
        self,
        eqn: Any,
        path: Path,
        inputs: Sequence[Any],
        inner: Control,
        plans: Sequence[Plan | None],
        moving: tuple[Sequence[Bits] | None, Sequence[Bits] | None],
    ) -> Iterator[_Spelled]:
        """Add the bodies of an equation, and yield each with what it makes."""
        (flags, own), carried = moving, dict[int, Node]()
        outside, found = self.graph.found, list[Node | None]()
        bodies = list(zip(inner.bodies, plans, _divided(own, plans), strict=True))
        # In reverse: the condition of a `while` is asked about what the body carries,
        # and the joints that stand for that are made with the body.
        for body, plan, mine in reversed(bodies):
            operands = [carried.get(k, inputs[k]) for k in body.operands]
            first, pairs = len(self.graph.maker), fed_back(body)
            moves = bool(plan and plan.found) if mine is None else any(mine)
            joints = self._joints(eqn, path, body, pairs, operands, moves)
            carried = {body.operands[k]: joint for k, joint in joints.items()}
            moved = None
            if flags is not None and mine is not None:
                moved = [flags[k] for k in body.operands]
                moved = self._reach.entering(body, plan, moved, mine)
            around, self._within = self._within, (*self._within, eqn)
            self.graph.found = []
            results, refs = self.inline(body.jaxpr, operands, path, plan, moved)
            self._within, found = around, [*self.graph.found, *found]
            for out, back in () if inner.is_empty else pairs:
                self._feed_back(joints[back], [*results, *refs][out])
            if joints:
                self.graph.loops.append((first, len(self.graph.maker) - 1))
            yield _Spelled(body, results, refs, joints)
        self.graph.found = [*outside, *found]

    def _joints(
        self,
        eqn: Any,
        path: Path,
        body: Body,
        feedback: Sequence[tuple[int, int]],
        operands: list[Any],
        moves: bool,
    ) -> dict[int, Node]:
        """Put a joint in place of each carried operand; `moves`: what is found does."""
        if not feedback:
            return {}
        op, joints = self._op(eqn, path, join=True), dict[int, Node]()
        # One carry may move another only in the second round: if any does, all do.
        moves = moves or any(self._moves[x] for x in operands if x is not None)
        for _, back in feedback:
            start = [operands[back]]
            aval = body.jaxpr.invars[back].aval
            joint = self._result(op, aval, start, start)
            self._moves[joint] = moves  # in some round, perhaps
            joints[back] = operands[back] = joint
        return joints

    def _feed_back(self, joint: Node, source: Node | None) -> None:
        # Handed on as it came, it is fed by nothing new.
        if source is None or source == joint:
            return
        self.graph.feeds[joint] = (*self.graph.feeds[joint], source)
        if carries(self.graph.avals[joint]):
            self.graph.grads[joint] = (*self.graph.grads[joint], source)


def _divided(
    own: Sequence[Bits] | None, plans: Sequence[Plan | None]
) -> list[Sequence[Bits] | None]:
    """Divide what stands for found values among the bodies that they are in."""
    if own is None:
        return [None] * len(plans)
    ends = list(itertools.accumulate(len(p.found) if p else 0 for p in plans))
    return [own[a:b] for a, b in itertools.pairwise([0, *ends])]


def _values(values: Iterable[Any]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(v for v in values if v is not None))
