"""What rules that are told of it return for those results that a gradient comes to."""

from __future__ import annotations

from collections.abc import Iterable

import stopgrad_jax._jax as _jax

from .derivative_rules import Rules
from .fed import feeds_of
from .graph import Graph, Node, Operation


def towards(graph: Graph, sinks: Iterable[Node]) -> Graph:
    """Return the graph with rules asked about those results that a gradient comes to.

    Custom rules with symbolic zeros are told which of their results that are. Of those
    to which none comes they are not asked: what ends it is behind the rule.
    """
    asked = [k for k, op in enumerate(graph.ops) if op.is_told and _has_several(op)]
    if not asked:
        return graph
    new, rules, sinks = graph.copied(asked), Rules(), list(sinks)
    for _ in range(_ROUNDS):
        arrives, changed = new.backward(sinks, new.grads), False
        # From the last: what comes to a rule depends on those that follow it.
        for op in map(new.ops.__getitem__, reversed(asked)):
            cotangents = sum(1 << k for k, v in enumerate(op.values) if arrives[v])
            if cotangents == op.cotangents:
                continue
            op.cotangents = cotangents
            answer, op.refuses = rules.by_source(op.eqn, op.moving, cotangents)
            op.always = answer.always
            before = [new.grads[value] for value in op.values]
            fed = feeds_of(graph, op.eqn, op.inputs, answer)
            asked_of = zip(op.values, answer.dependence, fed, strict=False)
            for value, bits, feeds in asked_of:
                come = (x for k, x in enumerate(op.inputs) if bits >> k & 1)
                grads = tuple(dict.fromkeys(x for x in come if x is not None))
                new.grads[value] = grads if arrives[value] else graph.grads[value]
                new.feeds[value] = feeds if arrives[value] else graph.feeds[value]
            if before != [new.grads[value] for value in op.values]:
                arrives, changed = new.backward(sinks, new.grads), True
        if not changed:
            break
    return new


_ROUNDS = 8  # in a loop, the rules that follow one may be those before it


def _has_several(op: Operation) -> bool:
    floats = [v for v in op.eqn.outvars if _jax.is_differentiable(v.aval)]
    return bool(op.eqn.params.get("symbolic_zeros")) and len(floats) > 1
