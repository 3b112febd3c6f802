"""Which operands feed each result of an equation, with a gradient or without one.

A gate and a custom rule may take a whole tree and return one. Each result is then of
its own operands, as without the rule: of what its value is computed from, and of what
the rule hands its cotangent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .apart import operands_by_result
from .computed import computed_from
from .derivative_rules import Answer
from .graph import Graph, Node
from .reach import Bits, union


def feeds_of(
    graph: Graph,
    eqn: Any,
    inputs: Sequence[Node | None],
    answer: Answer,
) -> list[tuple[Node, ...]]:
    """Return, for each result of an equation, the values among `inputs` that feed it.

    `answer` is what its rule says. What no result is of, as the limit of a clip, feeds
    those whose derivative is computed with it; all, where that is not known.
    """
    gate = _jax.gate_name(eqn)
    if gate and not eqn.outvars[1:]:
        table = [(1 << len(inputs)) - 1]
    elif not gate and _jax.kind_of(eqn) not in _jax.CUSTOM:
        table = operands_by_result(eqn)
    else:
        read = computed_from(eqn)
        if gate:
            read = [_behind(eqn, graph, inputs, k) for k in range(len(eqn.outvars))]
        table = [a | b for a, b in zip(read, answer.dependence, strict=True)]
        of_some = union(table)
        known = {x for k, x in enumerate(inputs) if of_some >> k & 1}
        rest = sum(1 << k for k, x in enumerate(inputs) if x not in known)
        reads = answer.reads or [rest] * len(table)
        table = [bits | rest & r for bits, r in zip(table, reads, strict=True)]
    return [_values(inputs, bits) for bits in table]


def _behind(eqn: Any, graph: Graph, inputs: Sequence[Node | None], k: int) -> Bits:
    """Operands of a gate that its k-th value is, or is computed from by its function.

    What an operand is computed from itself, the gate has nothing to do with.
    """
    values, sources = eqn.params["split"]
    moved = inputs[values : values + sources]
    made = {*inputs[:values]} - {*moved}  # which are among its parameters, too
    given = {x for x in inputs if x is not None} - made
    found = {x for x in inputs[k : k + 1] if x is not None}
    first, waiting = min(given, default=0), list(found - given)
    while waiting:
        # What was made before all operands is computed from none of them.
        new = {x for x in graph.feeds[waiting.pop()] if x >= first} - found
        found |= new
        waiting += new - given
    return sum(1 << n for n, x in enumerate(inputs) if x is not None and x in found)


def _values(inputs: Sequence[Node | None], bits: Bits) -> tuple[Node, ...]:
    of = (x for k, x in enumerate(inputs) if bits >> k & 1)
    return tuple(dict.fromkeys(x for x in of if x is not None))
