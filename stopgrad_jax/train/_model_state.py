"""State of a model among its parameters, told by the types that libraries give it.

Running statistics and counts of random numbers change without a gradient. flax's nnx
and equinox have types for them, flax's linen a name; nothing is imported for it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import stopgrad_jax._words.train as words
from stopgrad_jax._address import is_address, printed
from stopgrad_jax._errors import wrong
from stopgrad_jax._where import Where

from ._examine import Examined

_KEYS = tuple(map(jax.tree_util.DictKey, ("params", "batch_stats")))  # as linen says


@dataclasses.dataclass(frozen=True)
class Stateful:
    """A part of the parameters that is none.

    Attributes:
      path: where it is, from the parameters' root.
      leaves: the numbers of its leaves, in JAX's order.
      library: "nnx", "equinox" or "linen".
      counts: it counts the random numbers that were drawn; else it is statistics.
      stream: the name of the stream of random numbers.
    """

    path: str
    leaves: range
    library: str
    counts: bool = False
    stream: str = ""


def stateful(params: Any) -> list[Stateful]:
    """Find the state of a model in its parameters."""
    return [*_by_type(params), *_by_name(params)]


def refuse_trained(
    states: Sequence[Stateful], trained: Sequence[int], frozen: Where, called: str
) -> None:
    """Raise where an optimizer would move statistics."""
    every = [s for s in states if not s.counts]
    found = [s for s in every if not set(s.leaves).isdisjoint(trained)]
    if found:
        library = found[0].library
        paths = [s.path for s in found if s.library == library]
        before = frozen if isinstance(frozen, list | tuple) else [frozen]
        also = words.frozen([*before, *paths])
        if frozen is None:
            also = words.frozen([s.path for s in every])
            also = words.FROZEN_STATISTICS if library == "nnx" else also
        elif not all(map(is_address, before)):
            also = words.FROZEN_TOO
        raise wrong(ValueError, called, *words.state_trains(library, paths, also))


def refuse_lost(states: Sequence[Stateful], examined: Examined, called: str) -> None:
    """Raise where the next value of a state goes nowhere."""
    counts = [s for s in states if s.counts and any(map(examined.stays, s.leaves))]
    if counts:
        paths, streams = [s.path for s in counts], [s.stream for s in counts]
        raise wrong(ValueError, called, *words.same_numbers(paths, streams))
    rest = (s for s in states if not s.counts)
    lost = [s for s in rest if any(map(examined.is_thrown_away, s.leaves))]
    if lost:
        library = lost[0].library
        paths = [s.path for s in lost if s.library == library]
        told = words.state_is_lost(library, paths)
        raise wrong(ValueError, called, *told)


def _by_type(params: Any) -> Iterator[Stateful]:
    """Yield what libraries mark by its type as state, and not as a parameter."""
    nnx, eqx = (sys.modules.get(name) for name in ("flax.nnx", "equinox"))
    types = (nnx.BatchStat, nnx.RngCount) if nnx else ()
    types += (eqx.nn.State,) if eqx else ()
    if not types:
        return
    flat, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, types)
    )
    first = 0
    for path, node in flat:
        leaves = range(first, first + len(jax.tree.leaves(node)))
        first = leaves.stop
        if nnx and isinstance(node, nnx.RngCount):
            stream = str(getattr(node, "tag", "default"))
            yield Stateful(printed(path), leaves, "nnx", True, stream)
        elif isinstance(node, types):
            is_flax = nnx and isinstance(node, nnx.BatchStat)
            yield Stateful(printed(path), leaves, "nnx" if is_flax else "equinox")


def _by_name(params: Any) -> Iterator[Stateful]:
    """Find `{"params": ..., "batch_stats": ...}`, wherever it is in the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [path for path, _ in flat]
    above = {path[:k] for path in paths for k in range(len(path) + 1)}
    groups: dict[Any, list[int]] = {}
    for number, path in enumerate(paths):
        for k, key in enumerate(path):
            if key == _KEYS[1] and (*path[:k], _KEYS[0]) in above:
                groups.setdefault(path[: k + 1], []).append(number)
    for path, numbers in groups.items():
        yield Stateful(printed(path), range(numbers[0], numbers[-1] + 1), "linen")
