"""A whole program as one flat graph of values, every nested jaxpr spelled out.

A value knows the values it is computed from (`feeds`) and, among them, those that its
tangent is computed from (`grads`). `Reach` answers which inputs reach which results;
here is also the way between them. A loop is in it once: its carry is a *join* of the
initial value and of what the body hands on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .connect import Bits
from .dependence import Rules, chosen
from .labels import Labels, Path, Spot
from .nested import Body, nested
from .overwrite import Overwrites
from .walk import Found, Plan

Value = int  # the number of a value


class Op:
    """An equation at one place of the program, or the joint of a loop or branch."""

    __slots__ = (
        "eqn",
        "held",
        "join",
        "known",
        "masks",
        "overwrites",
        "path",
        "values",
    )

    def __init__(self, eqn: Any, path: Path, join: bool = False) -> None:
        self.eqn, self.path, self.join = eqn, path, join
        self.values: list[Value] = []
        self.masks = self.overwrites = self.held = False
        self.known = True

    @property
    def spot(self) -> Spot | None:
        """The user's expression, or None where there is no source."""
        return self.path.spots[-1] if self.path.spots else None

    @property
    def name(self) -> str:
        """What the user called, as the source spells it, or JAX's name for it."""
        called = (self.spot.callee if self.spot else "") or _jax.gate_name(self.eqn)
        return called or _jax.call_name(self.eqn) or self.eqn.primitive.name


class Graph:
    """The values of a program, numbered in program order.

    `inputs`, `outputs` and `found` (of a plan) are numbers of values, or None for what
    is constant. `ops[maker[v]]` made value v; `maker[v]` is -1 for an input.
    """

    def __init__(
        self,
        jaxpr: Any,
        labels: Labels,
        plan: Plan | None = None,
        held: Callable[[Found], bool] = lambda found: False,
    ) -> None:
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.maker: list[int] = []
        self.grads: list[Sequence[Value]] = []
        self.feeds: list[Sequence[Value]] = []
        self.loops: list[tuple[Value, Value]] = []  # first value and last one of each
        self.found: list[Value | None] = []
        # A value that is one of several, whichever the run decides (None: a constant).
        self.cases: dict[Value, Sequence[Value | None]] = {}
        self._labels, self._held = labels, held
        self._rules, self._overwrites = Rules(), Overwrites()
        self.inputs = [self._value(v.aval, -1, (), ()) for v in jaxpr.invars]
        self.outputs = self._inline(jaxpr, self.inputs, labels.nowhere, plan)

    # Passes ---------------------------------------------------------------------

    def forward(
        self,
        sources: Iterable[tuple[Value, Bits]],
        through: Sequence[Sequence[Value]],
        cases: Mapping[Value, Sequence[Value | None]] | None = None,
    ) -> list[Bits]:
        """Carry bits from values to all that follows, along `grads` or `feeds`.

        With `cases`, a value that is one of several counts only for what comes with
        each of them.
        """
        own, cases = [0] * len(self.maker), cases or {}
        for value, bits in sources:
            own[value] |= bits
        out = list(own)
        ends: dict[Value, list[Value]] = {}
        for first, end in self.loops:
            ends.setdefault(end, []).append(first)
        value, last = 0, len(out)
        while value < last:
            bits = own[value]
            if value in cases and through[value]:
                each = [0 if v is None else out[v] for v in cases[value]]
                bits |= functools.reduce(int.__and__, each)
            else:
                for source in through[value]:
                    bits |= out[source]
            out[value] = bits
            for first in ends.get(value, ()):
                if self._grows(first, value, through, out):
                    value = first - 1
                    break
            value += 1
        return out

    def _grows(self, first: Value, last: Value, through: Any, out: list[Bits]) -> bool:
        """Tell whether a joint of this loop would change in another round."""
        for value in range(first, last + 1):
            sources = through[value]
            if not sources or sources[-1] < value:
                continue
            if any(out[source] & ~out[value] for source in sources):
                return True
        return False

    def without(self, blocked: Callable[[Op], bool]) -> list[Sequence[Value]]:
        """Return `grads` as if nothing passed some operations."""
        shut = [blocked(op) for op in self.ops]
        pairs = zip(self.grads, self.maker, strict=True)
        return [() if maker >= 0 and shut[maker] else g for g, maker in pairs]

    def backward(
        self, sinks: Iterable[Value], through: Sequence[Sequence[Value]]
    ) -> bytearray:
        """Flag all that the sinks are computed from, along `grads` or `feeds`."""
        live = bytearray(len(self.maker))
        waiting = list(sinks)
        for value in waiting:
            live[value] = 1
        while waiting:
            for source in through[waiting.pop()]:
                if not live[source]:
                    live[source] = 1
                    waiting.append(source)
        return live

    @functools.cached_property
    def followers(self) -> list[list[Value]]:
        """For each value, those whose tangent is computed from its own."""
        out: list[list[Value]] = [[] for _ in self.maker]
        for value, sources in enumerate(self.grads):
            for source in sources:
                out[source].append(value)
        return out

    @functools.cached_property
    def readers(self) -> list[list[int]]:
        """For each value, the numbers of the operations that read it."""
        out: list[list[int]] = [[] for _ in self.maker]
        for value, sources in enumerate(self.feeds):
            for source in sources:
                out[source].append(self.maker[value])
        return out

    # Building -------------------------------------------------------------------

    def _value(
        self, aval: Any, maker: int, grads: Sequence[Value], feeds: Sequence[Value]
    ) -> Value:
        self.avals.append(aval)
        self.maker.append(maker)
        self.grads.append(grads)
        self.feeds.append(feeds)
        return len(self.maker) - 1

    def _op(self, eqn: Any, path: Path, join: bool = False) -> Op:
        op = Op(eqn, path, join)
        self.ops.append(op)
        return op

    def _result(
        self, op: Op, aval: Any, grads: Iterable[Any], feeds: Iterable[Any]
    ) -> Value:
        carries = hasattr(aval, "dtype") and _jax.is_differentiable(aval)
        by_tangent = _values(grads) if carries or _jax.is_ref(aval) else ()
        value = self._value(aval, len(self.ops) - 1, by_tangent, _values(feeds))
        op.values.append(value)
        return value

    def _inline(
        self, jaxpr: Any, operands: Sequence[Any], outer: Path, plan: Plan | None
    ) -> list[Value | None]:
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
                self.found += [results[0] if results else None] * count
            elif inner is None or inner.rule:
                sources = None if match else overwritten.get(index)
                kept = None if sources is None else [value_of(v) for v in sources]
                results = self._equation(eqn, path, inputs, kept)
                self.found += [None] * (len(match.inside) if match else 0)
            else:
                plans = (match.plans if match else ()) or (None,) * len(inner.bodies)
                results = self._nested(eqn, path, inputs, inner, plans)
            if match and match.own and not any(map(_jax.is_ref, _avals(eqn.invars))):
                for k, own in enumerate(match.own):
                    if self._held(own):
                        results[k] = self._stop(eqn, path, results[k])
                    self.found.append(results[k])
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
            self.cases[op.values[0]] = inputs[1:]
        if not results:
            self._result(op, None, (), inputs)
        return results[: len(eqn.outvars)]

    def _stop(self, eqn: Any, path: Path, value: Value | None) -> Value | None:
        """A value that is held: the same, with nothing behind it."""
        if value is None:
            return None
        op = self._op(eqn, path)
        op.held = True
        return self._result(op, self.avals[value], (), (value,))

    def _reference(
        self, eqn: Any, path: Path, inputs: Sequence[Any], env: dict[Any, Any]
    ) -> list[Value | None]:
        op = self._op(eqn, path)
        value = self._value(eqn.invars[0].aval, len(self.ops) - 1, *_twice(inputs))
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
        outside, found = self.found, list[list[Value | None]]()
        # In reverse: what decides on another round reads what the body carries.
        for body, plan in reversed(list(zip(inner.bodies, plans, strict=True))):
            operands = [carried.get(k, inputs[k]) for k in body.operands]
            first, joints = len(self.maker), dict[int, Value]()
            if body.feedback:
                joints = self._joints(eqn, path, body, operands)
                carried = {body.operands[k]: joint for k, joint in joints.items()}
            self.found = []
            results = self._inline(body.jaxpr, operands, path, plan)
            found.append(self.found)
            for out, back in body.feedback:
                self._feed_back(joints[back], results[out])
            if joints:
                self.loops.append((first, len(self.maker) - 1))
            elif inner.dynamic:
                steering += results
            for out, k in enumerate(body.results):
                if k is not None:
                    sources[k].append(results[out])
            for out, back in body.feedback if never else ():
                if (k := body.results[out]) is not None:
                    sources[k].append(joints[back])
        self.found = outside + [value for part in reversed(found) for value in part]
        if len(inner.bodies) == 1 and not never:
            return [values[0] for values in sources]
        op = self._op(eqn, path, join=True)
        results: list[Value | None] = [
            self._result(op, var.aval, values, [*values, *steering])
            for var, values in zip(eqn.outvars, sources, strict=True)
        ]
        if eqn.primitive.name == "cond":
            self.cases.update(zip(op.values, sources, strict=True))
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
        self.feeds[joint] = (*self.feeds[joint], source)
        if _jax.is_differentiable(self.avals[joint]):
            self.grads[joint] = (*self.grads[joint], source)


def _values(values: Iterable[Any]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(v for v in values if v is not None))


def _twice(inputs: Sequence[Any]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    return _values(inputs), _values(inputs)


def _avals(atoms: Iterable[Any]) -> list[Any]:
    return [atom.aval for atom in atoms]
