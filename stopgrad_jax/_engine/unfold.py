"""Spell a program out as one graph: every nested jaxpr where it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .dependence import Rules, chosen
from .graph import Graph, Op, Value
from .labels import Labels, Path
from .nested import Body, nested
from .overwrite import Overwrites
from .walk import Found, Plan


def unfold(
    jaxpr: Any,
    labels: Labels,
    plan: Plan | None = None,
    held: Callable[[Found], bool] = lambda found: False,
) -> Graph:
    """Return the graph of a program, with the values that a plan found in it.

    Nothing is connected to a found value that is `held` but what follows it.
    """
    unfolding = _Unfolding(labels, held)
    graph = unfolding.graph
    graph.inputs = [unfolding.value(v.aval, -1, (), ()) for v in jaxpr.invars]
    graph.outputs = unfolding.inline(jaxpr, graph.inputs, labels.nowhere, plan)
    return graph


class _Unfolding:
    def __init__(self, labels: Labels, held: Callable[[Found], bool]) -> None:
        self.graph = Graph()
        self._labels, self._held = labels, held
        self._rules, self._overwrites = Rules(), Overwrites()

    def value(
        self, aval: Any, maker: int, grads: Sequence[Value], feeds: Sequence[Value]
    ) -> Value:
        """Add a value."""
        self.graph.avals.append(aval)
        self.graph.maker.append(maker)
        self.graph.grads.append(grads)
        self.graph.feeds.append(feeds)
        return len(self.graph.maker) - 1

    def _op(self, eqn: Any, path: Path, join: bool = False) -> Op:
        op = Op(eqn, path, join)
        self.graph.ops.append(op)
        return op

    def _result(
        self, op: Op, aval: Any, grads: Iterable[Any], feeds: Iterable[Any]
    ) -> Value:
        carries = hasattr(aval, "dtype") and _jax.is_differentiable(aval)
        by_tangent = _values(grads) if carries or _jax.is_ref(aval) else ()
        value = self.value(aval, len(self.graph.ops) - 1, by_tangent, _values(feeds))
        op.values.append(value)
        return value

    def inline(
        self, jaxpr: Any, operands: Sequence[Any], outer: Path, plan: Plan | None
    ) -> list[Value | None]:
        """Add a jaxpr's operations; return its results."""
        env: dict[Any, Value | None] = dict(zip(jaxpr.invars, operands, strict=True))
        matches = {m.index: m for m in plan.matches} if plan else {}
        overwritten = self._overwrites(jaxpr, plan.consts if plan else ())

        def value_of(atom: Any) -> Value | None:
            return None if isinstance(atom, _jax.Literal) else env.get(atom)

        for index, eqn in enumerate(jaxpr.eqns):
            path = self._labels.path(eqn, outer)
            inputs = [value_of(atom) for atom in eqn.invars]
            match = matches.get(index)
            inner = nested(eqn)
            if any(_jax.is_ref(atom.aval) for atom in eqn.invars):
                results = self._reference(eqn, path, inputs, env)
                count = len(match.inside) + len(match.own) if match else 0
                self.graph.found += [results[0] if results else None] * count
            elif inner is None or inner.rule:
                sources = None if match else overwritten.get(index)
                kept = None if sources is None else [value_of(v) for v in sources]
                results = self._equation(eqn, path, inputs, kept)
                self.graph.found += [None] * (len(match.inside) if match else 0)
            else:
                plans = (match.plans if match else ()) or (None,) * len(inner.bodies)
                results = self._nested(eqn, path, inputs, inner, plans)
            if match and match.own and not any(map(_jax.is_ref, _avals(eqn.invars))):
                for k, own in enumerate(match.own):
                    if self._held(own):
                        results[k] = self._stop(eqn, path, results[k])
                    self.graph.found.append(results[k])
            env.update(zip(eqn.outvars, results, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, path: Path, inputs: Sequence[Any], kept: Sequence[Any] | None
    ) -> list[Value | None]:
        if (case := chosen(eqn)) is not None:
            inputs = [x if k == case else None for k, x in enumerate(inputs)]
        if not any(x is not None for x in inputs):
            return [None] * len(eqn.outvars)
        op = self._op(eqn, path)
        answer = self._rules.answer(eqn)
        op.masks = answer.masks
        op.known = answer.known and _jax.gate_name(eqn) != "prevent_gradient"
        op.overwrites = kept is not None
        results: list[Value | None] = []
        for var, bits in zip(eqn.outvars, answer.dependence, strict=True):
            grads = [x for k, x in enumerate(inputs) if bits >> k & 1]
            if kept is not None:
                grads = kept
            results.append(self._result(op, var.aval, grads, inputs))
        if eqn.primitive.name == "select_n" and case is None:
            self.graph.cases[op.values[0]] = inputs[1:]
        if not results:
            self._result(op, None, (), inputs)
        return results[: len(eqn.outvars)]

    def _stop(self, eqn: Any, path: Path, value: Value | None) -> Value | None:
        """A value that is held: the same, with nothing behind it."""
        if value is None:
            return None
        op = self._op(eqn, path)
        op.held = True
        return self._result(op, self.graph.avals[value], (), (value,))

    def _reference(
        self, eqn: Any, path: Path, inputs: Sequence[Any], env: dict[Any, Any]
    ) -> list[Value | None]:
        op = self._op(eqn, path)
        value = self.value(eqn.invars[0].aval, len(self.graph.ops) - 1, *_twice(inputs))
        op.values.append(value)
        # What is written to a reference may be read from it anywhere later.
        refs = [atom for atom in eqn.invars if _jax.is_ref(atom.aval)]
        env.update((ref, value) for ref in refs)
        return [value] * len(eqn.outvars)

    def _nested(
        self,
        eqn: Any,
        path: Path,
        inputs: Sequence[Any],
        inner: Any,
        plans: Sequence[Plan | None],
    ) -> list[Value | None]:
        sources: list[list[Value | None]] = [[] for _ in eqn.outvars]
        steering: list[Value | None] = []
        if eqn.primitive.name == "cond":
            steering.append(inputs[0])
        never = inner.dynamic or eqn.params.get("length") == 0  # may run no round
        carried: dict[int, Value] = {}
        outside, found = self.graph.found, list[list[Value | None]]()
        # In reverse: what decides on another round reads what the body carries.
        for body, plan in reversed(list(zip(inner.bodies, plans, strict=True))):
            operands = [carried.get(k, inputs[k]) for k in body.operands]
            first, joints = len(self.graph.maker), dict[int, Value]()
            if body.feedback:
                joints = self._joints(eqn, path, body, operands)
                carried = {body.operands[k]: joint for k, joint in joints.items()}
            self.graph.found = []
            results = self.inline(body.jaxpr, operands, path, plan)
            found.append(self.graph.found)
            for out, back in body.feedback:
                self._feed_back(joints[back], results[out])
            if joints:
                self.graph.loops.append((first, len(self.graph.maker) - 1))
            elif inner.dynamic:
                steering += results
            for out, k in enumerate(body.results):
                if k is not None:
                    sources[k].append(results[out])
            for out, back in body.feedback if never else ():
                if (k := body.results[out]) is not None:
                    sources[k].append(joints[back])
        self.graph.found = outside + [
            value for part in reversed(found) for value in part
        ]
        if len(inner.bodies) == 1 and not never:
            return [values[0] for values in sources]
        op = self._op(eqn, path, join=True)
        op.known = not inner.dynamic  # a while loop has no reverse mode
        results: list[Value | None] = [
            self._result(op, var.aval, values, [*values, *steering])
            for var, values in zip(eqn.outvars, sources, strict=True)
        ]
        if eqn.primitive.name == "cond":
            self.graph.cases.update(zip(op.values, sources, strict=True))
        return results

    def _joints(
        self, eqn: Any, path: Path, body: Body, operands: list[Any]
    ) -> dict[int, Value]:
        """Put a joint in place of each carried operand."""
        op, joints = self._op(eqn, path, join=True), {}
        for _, back in body.feedback:
            start = [operands[back]]
            aval = body.jaxpr.invars[back].aval
            joints[back] = operands[back] = self._result(op, aval, start, start)
        return joints

    def _feed_back(self, joint: Value, source: Value | None) -> None:
        if source is None or source == joint:
            return
        self.graph.feeds[joint] = (*self.graph.feeds[joint], source)
        if _jax.is_differentiable(self.graph.avals[joint]):
            self.graph.grads[joint] = (*self.graph.grads[joint], source)


def _values(values: Iterable[Any]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(v for v in values if v is not None))


def _twice(inputs: Sequence[Any]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    return _values(inputs), _values(inputs)


def _avals(atoms: Iterable[Any]) -> list[Any]:
    return [atom.aval for atom in atoms]
