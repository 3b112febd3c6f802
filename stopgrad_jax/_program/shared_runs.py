"""Evaluate runs of equations that nothing happens to, as fast as JAX can.

JAX differentiates an equation in about 0.2 ms, but the call of a jitted function it
has differentiated before in about 0.05 ms. So while a program is being traced, runs
of equations that occur more than once are evaluated as calls of one inlined jitted
function. Where runs begin and end is decided by the equations themselves (as rsync
finds equal blocks in files), so equal layers are cut alike wherever they stand.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.as_written import is_as_written

from .signature import fingerprint, signature

_LONGEST = 64  # equations in a block
_CUT = 8  # a block ends after one equation in so many
_SHARED = 3  # occurrences from which sharing a single equation pays


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive equations, the variables they read and those that are read later."""

    eqns: Sequence[Any]
    reads: tuple[Any, ...]
    writes: tuple[Any, ...]
    key: Any = None  # equal for runs that share a function


class Runs:
    """Cuts programs into runs and evaluates them; equal ones share a function.

    A shared function has the source lines of the first. `shared=False` leaves each
    equation its own, for what tells lines, and so does `as_written()`.
    """

    def __init__(self, shared: bool = True) -> None:
        self._shared = shared
        self._functions: dict[Any, Callable[..., list[Any]]] = {}
        self._numbers: dict[Any, int] = {}

    def evaluate(self, run: Run, values: Sequence[Any]) -> list[Any]:
        """Evaluate a run on the values it reads."""
        if run.key is None:
            return _evaluate(run, *values)
        if run.key not in self._functions:
            # Inlined: the program that is made holds the equations, and no call of
            # ours.
            function = functools.partial(_evaluate, run)
            self._functions[run.key] = jax.jit(function, inline=True)
        return self._functions[run.key](*values)

    def cut(
        self, eqns: Sequence[Any], alone: Container[int], outvars: Iterable[Any]
    ) -> list[Run]:
        """Cut equations into runs; those whose id is in `alone` by themselves."""
        # Evaluated one by one there is nothing to share.
        if not self._shared or is_as_written() or not _jax.is_tracing():
            return _wired(_blocks(eqns, alone), outvars)
        content = _Content({id(eqn): self._number(eqn) for eqn in eqns}, alone)
        blocks = _wired(content.blocks(eqns), outvars, content.number)
        times = collections.Counter(block.key for block in blocks)
        finer = content.single_out_common(blocks, times)
        runs = _wired(finer, outvars, content.number)
        return content.keep_shared_keys(runs, times)

    def _number(self, eqn: Any) -> int:
        # Equations of different scopes stay apart: profiles show the scope.
        key = (signature(eqn), eqn.source_info.name_stack)
        return self._numbers.setdefault(key, len(self._numbers))


class _Content:
    """Cuts equations by what they are, as rsync cuts a file: "content-defined chunks".

    Blocks of a fixed length would differ from each other in all layers behind one that
    has an equation more. Where the equations themselves say where a block ends, equal
    layers are in step again behind the first border.
    """

    def __init__(self, numbers: Mapping[int, int], alone: Container[int]) -> None:
        self._numbers, self._alone = numbers, alone
        self._occurs = collections.Counter(numbers.values())

    def number(self, eqn: Any) -> int:
        """Return the number of an equation: equal ones have the same."""
        return self._numbers[id(eqn)]

    def _is_common(self, eqn: Any) -> bool:
        return eqn is not None and self._occurs[self.number(eqn)] >= _SHARED

    def blocks(self, eqns: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Cut where two neighbors say so, about once in `_CUT` times."""

        def is_end(eqn: Any, following: Any) -> bool:
            pair = (self.number(eqn), self._numbers.get(id(following)))
            return hash(pair) % _CUT == 0

        return _blocks(eqns, self._alone, is_end)

    def single_out_common(
        self, blocks: Iterable[Run], times: Mapping[Any, int]
    ) -> Iterator[Sequence[Any]]:
        """Cut blocks that occur once, so that their common equations are shared."""

        def is_end(eqn: Any, following: Any) -> bool:
            return self._is_common(eqn) or self._is_common(following)

        for block in blocks:
            if times[block.key] > 1:
                yield block.eqns
            else:
                yield from _blocks(block.eqns, self._alone, is_end)

    def keep_shared_keys(
        self, runs: Iterable[Run], times: Mapping[Any, int]
    ) -> list[Run]:
        """Take the key of runs that occur once: there is nothing to share them with."""

        def is_shared(run: Run) -> bool:
            one = len(run.eqns) == 1 and self._is_common(run.eqns[0])
            return one or times[run.key] > 1

        return [r if is_shared(r) else dataclasses.replace(r, key=None) for r in runs]


def _evaluate(run: Run, *values: Any) -> list[Any]:
    jaxpr = _jax.subjaxpr(run.eqns, run.reads, run.writes)
    return list(_jax.evaluate(jaxpr, (), values))


def _blocks(
    eqns: Sequence[Any],
    alone: Container[int],
    is_end: Callable[[Any, Any], bool] = lambda eqn, following: False,
) -> Iterator[list[Any]]:
    """Cut equations where `is_end` says so of two neighbors, and around each `alone`.

    A block that is too long is cut, too, but not within one call: its equations are
    run together, see `_jax.as_called`.
    """
    block = []
    for eqn, following in itertools.zip_longest(eqns, eqns[1:]):
        block.append(eqn)
        in_one_call = following and _jax.are_inlined(eqn, following)
        too_long = len(block) >= _LONGEST and not in_one_call
        is_border = id(eqn) in alone or id(following) in alone
        if too_long or is_border or is_end(eqn, following):
            yield block
            block = []
    if block:
        yield block


def _wired(
    blocks: Iterable[Sequence[Any]],
    outvars: Iterable[Any],
    signature: Callable[[Any], Any] | None = None,
) -> list[Run]:
    """Make runs of consecutive blocks; each hands on only what is read later."""
    needed = {v for v in outvars if not isinstance(v, _jax.Literal)}
    runs = []
    # Backwards: what a block hands on is known when all behind it have been seen.
    for block in reversed(list(blocks)):
        writes = tuple(v for eqn in block for v in eqn.outvars if v in needed)
        reads = _reads(block)
        key = fingerprint(block, reads, writes, signature) if signature else None
        runs.append(Run(block, reads, writes, key))
        needed.update(reads)
    return runs[::-1]


def _reads(eqns: Iterable[Any]) -> tuple[Any, ...]:
    """Variables that these equations take from outside, in order."""
    defined, found = set(), dict[Any, None]()
    for eqn in eqns:
        for atom in eqn.invars:
            if not isinstance(atom, _jax.Literal) and atom not in defined:
                found[atom] = None
        defined.update(eqn.outvars)
    return tuple(found)
