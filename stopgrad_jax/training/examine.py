"""What a step knows of its loss when it is traced, before any number is there.

Which leaves the loss cannot train, whether it divides by what depends on the batch, and
which state of a model it throws away. Nothing of it is in the compiled step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
import stopgrad_jax._words as words
from stopgrad_jax._engine.differentiate import Differentiation
from stopgrad_jax._engine.graph import Graph
from stopgrad_jax._engine.labels import Labels, printed_place
from stopgrad_jax._engine.nested import nested
from stopgrad_jax._engine.select import look_up
from stopgrad_jax._engine.trace import Value, trace
from stopgrad_jax._engine.unfold import unfold

from . import micro
from .gradient import Objective
from .state import Split

# What makes a scalar of others: their sum, a multiple of one, or one of them.
_PARTS = frozenset(
    "add sub add_any neg mul div convert_element_type copy reduce_precision select_n "
    "max min squeeze reshape".split()
)


class Examined:
    """A loss as it is called in a step, traced at one batch or micro-batch.

    Attributes:
      places: the place of each leaf of the parameters, in JAX's order.
    """

    def __init__(self, objective: Objective, split: Split, batch: Any, key: Any):
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
        """Say where the loss divides by a scalar that depends on the batch, if it does.

        Only where the quotient is a part of the loss as it is: a term, or a multiple.
        """
        jaxpr, (y,) = self._traced.jaxpr, self._ys
        places = jax.tree.leaves(self._traced.positional[1])
        varies = {jaxpr.invars[x.index] for x in places if isinstance(x, Value)}
        lines, _ = _divisions(jaxpr, jaxpr.outvars[y.index], varies, "no source")
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
            aval = jaxpr.outvars[y.index].aval if isinstance(y, Value) else None
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


def _divisions(
    jaxpr: Any, out: Any, varies: set[Any], line: str
) -> tuple[list[str], list[Any]]:
    """Return the lines of divisions behind a scalar, and the inputs it is made of.

    `varies` are the inputs that vary; what is divided by has to be made of them.
    """
    varies, made = set(varies), {}
    for eqn in jaxpr.eqns:
        made.update((v, eqn) for v in eqn.outvars)
        if not varies.isdisjoint(filter(_is_variable, eqn.invars)):
            varies.update(eqn.outvars)
    lines, inputs, seen, waiting = list[str](), list[Any](), set[Any](), [out]
    while waiting:
        var = waiting.pop()
        if not _is_variable(var) or var in seen or var.aval.shape:
            continue
        seen.add(var)
        eqn = made.get(var)
        if eqn is None:
            inputs.append(var)
            continue
        here, inner = _jax.line_of(eqn) or line, nested(eqn)
        if eqn.primitive.name == "div":
            if _is_variable(eqn.invars[1]) and eqn.invars[1] in varies:
                lines.append(here)
            waiting.append(eqn.invars[0])
        elif eqn.primitive.name in _PARTS:
            waiting.extend(eqn.invars)
        for body in inner.bodies if inner else ():
            operands = [eqn.invars[k] for k in body.operands]
            pairs = list(zip(body.jaxpr.invars, operands, strict=True))
            inside = {i for i, o in pairs if _is_variable(o) and o in varies}
            ends = zip(body.jaxpr.outvars, body.results, strict=True)
            for end in [v for v, k in ends if k is not None and eqn.outvars[k] is var]:
                found, reached = _divisions(body.jaxpr, end, inside, here)
                lines += found
                waiting += [o for i, o in pairs if i in reached]
    return lines, inputs


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, _jax.Literal)
