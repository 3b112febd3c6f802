"""What a step knows of its loss when it is traced, before any number is there.

Which leaves the loss cannot train, whether it divides by what depends on the batch, and
which state of a model it throws away. Nothing of it is in the compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.train as words
import stopgrad_jax.train._micro as micro
from stopgrad_jax._places import printed_place
from stopgrad_jax._program.control import control
from stopgrad_jax._program.lookup import look_up
from stopgrad_jax._program.trace import Place, trace
from stopgrad_jax._program.wiring import Body
from stopgrad_jax._reach.differentiate import Differentiation
from stopgrad_jax._reach.graph import Graph
from stopgrad_jax._reach.unfold import unfold
from stopgrad_jax._source.labels import Labels

from ._gradient import Objective
from ._state import Parted

# What makes a number of others: their sum, a multiple of one, or one of them.
_PARTS = frozenset(
    "add sub add_any neg mul div convert_element_type copy reduce_precision select_n "
    "max min squeeze reshape".split()
)
# And what does so with the numbers of an array.
_OF_ARRAYS = _PARTS | frozenset(
    "reduce_sum dot_general broadcast_in_dim transpose concatenate slice rev".split()
)


class Examined:
    """A loss as it is called in a step, traced at one batch or micro-batch.

    Attributes:
      places: the place of each leaf of the parameters, in JAX's order.
    """

    def __init__(self, objective: Objective, split: Parted, batch: Any, key: Any):
        """Trace the loss."""
        self._called = objective.called
        if objective.accumulate > 1:
            parts = micro.split(batch, objective.accumulate, objective.called)
            batch, key = micro.picked(parts, key, 0)

        @functools.wraps(objective.loss.fun)
        def loss(params: Any, batch: Any, key: Any = None) -> Any:
            return objective.loss(params, batch, key)

        params = split.layout.join(split.trained, split.rest)
        args = (params, batch) if key is None else (params, batch, key)
        self._traced = trace(loss, args, {})
        self.places = jax.tree.leaves(self._traced.positional[0])
        self._ys = jax.tree.leaves(self._traced.output[0])

    def causes(self, leaves: Sequence[int]) -> dict[int, str]:
        """Say of those of these leaves that the loss cannot train why it cannot."""
        program = look_up(self._traced, (), self._called)
        xs = {self.places[k] for k in leaves}
        asked = Differentiation(program, xs, self._ys, (), self._called)
        connected = set(asked.connected)
        lost = [k for k in leaves if self.places[k] not in connected]
        ends = [y.index for y in self._ys]
        return {
            k: asked.why(self.places[k]) if self._depends(ends, k) else words.NOT_USED
            for k in lost
        }

    def divides_by_batch(self) -> str | None:
        """Say where the loss divides by a number that depends on the batch, if it does.

        Only where the quotient is a part of the loss as it is: a term, or a multiple.
        Of those of examples the divisor has to be a sum, as of their weights.
        """
        jaxpr, (y,) = self._traced.jaxpr, self._ys
        places = jax.tree.leaves(self._traced.positional[1])
        varies = {jaxpr.invars[x.index] for x in places if isinstance(x, Place)}
        kinds = _Kinds(varies, set())
        lines, _ = _divisions(jaxpr, jaxpr.outvars[y.index], kinds, "no source")
        return printed_place(lines[0]) if lines else None

    def is_thrown_away(self, leaf: int) -> bool:
        """Tell a leaf that is read, and of which nothing that is returned depends."""
        jaxpr = self._traced.jaxpr
        old = jaxpr.invars[self.places[leaf].index]
        is_read = any(old is v for eqn in jaxpr.eqns for v in eqn.invars)
        return is_read and not self._depends(range(len(jaxpr.outvars)), leaf)

    def stays(self, leaf: int) -> bool:
        """Tell a leaf that the loss uses, and that has no successor in aux."""
        jaxpr = self._traced.jaxpr
        old = jaxpr.invars[self.places[leaf].index].aval

        def is_like(y: Any) -> bool:
            aval = jaxpr.outvars[y.index].aval if isinstance(y, Place) else None
            return aval is not None and (aval.shape, aval.dtype) == (
                old.shape,
                old.dtype,
            )

        aux = jax.tree.leaves(self._traced.output[1])
        new = [y.index for y in aux if is_like(y)]
        return self._depends([y.index for y in self._ys], leaf) and not (
            self._depends(new, leaf)
        )

    def _depends(self, outputs: Iterable[int], leaf: int) -> bool:
        """Tell if any of these outputs is computed from a leaf."""
        graph = self._graph
        ends = [graph.outputs[k] for k in outputs]
        used = graph.backward([v for v in ends if v is not None], graph.feeds)
        return bool(used[graph.inputs[self.places[leaf].index]])

    @functools.cached_property
    def _graph(self) -> Graph:
        return unfold(self._traced.jaxpr, Labels(), needed=())  # no rule is asked


@dataclasses.dataclass(frozen=True)
class _Kinds:
    """The variables of a jaxpr that depend on the batch, and those that are its sums.

    A sum: of what depends on the batch, one number, also bounded, scaled or repeated.
    """

    varies: set[Any]
    sums: set[Any]

    def within(self, body: Body, eqn: Any) -> _Kinds:
        """What is known of the operands of a body."""
        operands = [eqn.invars[k] for k in body.operands]
        pairs = list(zip(body.jaxpr.invars, operands, strict=True))
        kinds = (self.varies, self.sums)
        return _Kinds(
            *({i for i, o in pairs if _is_variable(o) and o in kind} for kind in kinds)
        )

    def follow(self, jaxpr: Any) -> None:
        """Go through the operations of a jaxpr whose inputs are known."""
        for eqn in jaxpr.eqns:
            moving = {v for v in eqn.invars if _is_variable(v) and v in self.varies}
            if not moving:
                continue
            name, inner = eqn.primitive.name, control(eqn)
            bodies = inner.bodies if inner else ()
            if len(bodies) != 1:  # else it depends on what comes of the one body
                self.varies.update(eqn.outvars)
            if name == "select_n":  # one of several, whatever tells which
                moving = {v for v in moving if v is not eqn.invars[0]}
            if _is_over_examples(eqn):
                self.sums.update(eqn.outvars)
            elif name in _OF_ARRAYS and moving and moving <= self.sums:
                self.sums.update(eqn.outvars)
            for body in bodies:
                known = self._inside(body, eqn)
                for end, k in zip(body.jaxpr.outvars, body.results, strict=True):
                    if k is None or not _is_variable(end):
                        continue
                    if end in known.varies:
                        self.varies.add(eqn.outvars[k])
                    if end in known.sums:
                        self.sums.add(eqn.outvars[k])

    def _inside(self, body: Body, eqn: Any) -> _Kinds:
        """What is known of the values of a body, after as many rounds as it takes."""
        known = self.within(body, eqn)
        while True:
            known.follow(body.jaxpr)
            ends = ((body.jaxpr.outvars[i], j) for i, j in body.feedback)
            moving = (j for end, j in ends if _is_variable(end) and end in known.varies)
            fed = {body.jaxpr.invars[j] for j in moving} - known.varies
            if not fed:
                return known
            known.varies.update(fed)


def _divisions(
    jaxpr: Any, out: Any, kinds: _Kinds, line: str
) -> tuple[list[str], list[Any]]:
    """Return the lines of divisions behind a number, and the inputs it is made of.

    `kinds` tells the inputs; what is divided by has to depend on the batch.
    """
    kinds.follow(jaxpr)
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    lines, inputs, seen, waiting = list[str](), list[Any](), set[Any](), [out]
    while waiting:
        var = waiting.pop()
        if not _is_variable(var) or var in seen:
            continue
        seen.add(var)
        eqn = made.get(var)
        if eqn is None:
            inputs.append(var)
            continue
        here, inner = _jax.line_of(eqn) or line, control(eqn)
        divisor = _divisor(eqn)
        if divisor is not None:
            known = kinds.sums if var.aval.shape else kinds.varies
            if _is_variable(divisor) and divisor in known:
                lines.append(here)
            waiting.append(eqn.invars[0])
        elif eqn.primitive.name in _OF_ARRAYS:
            waiting.extend(eqn.invars)
        for body in inner.bodies if inner else ():
            ends = zip(body.jaxpr.outvars, body.results, strict=True)
            # What a loop stacks is of one example each, perhaps.
            ends = ((v, k) for v, k in ends if v.aval.shape == var.aval.shape)
            for end in [v for v, k in ends if k is not None and eqn.outvars[k] is var]:
                inside = kinds.within(body, eqn)
                found, reached = _divisions(body.jaxpr, end, inside, here)
                lines += found
                operands = zip(body.jaxpr.invars, body.operands, strict=True)
                waiting += [eqn.invars[k] for i, k in operands if i in reached]
    return lines, inputs


def _is_over_examples(eqn: Any) -> bool:
    """Tell a sum that makes one number, and not of the entries of one example."""
    (out, *_), axes = eqn.outvars, eqn.params.get("axes", ())
    if eqn.primitive.name == "reduce_sum":
        return not out.aval.shape or (out.aval.size == 1 and 0 in axes)
    return eqn.primitive.name == "dot_general" and not out.aval.shape


def _divisor(eqn: Any) -> Any:
    """What an operation divides by, or None."""
    if eqn.primitive.name == "div":
        return eqn.invars[1]
    exponent: Any = 0
    if eqn.primitive.name == "integer_pow":
        exponent = eqn.params["y"]
    elif eqn.primitive.name == "pow" and not _is_variable(eqn.invars[1]):
        exponent = eqn.invars[1].val
    return eqn.invars[0] if np.real(exponent) < 0 else None


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, _jax.Literal)
