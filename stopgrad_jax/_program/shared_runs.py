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
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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
            function = functools.partial(_evaluate, run)
            self._functions[run.key] = jax.jit(function, inline=True)
        return self._functions[run.key](*values)

    def cut(
        self, eqns: Sequence[Any], alone: Container[int], outvars: Iterable[Any]
    ) -> list[Run]:
        """Cut equations into runs; those whose id is in `alone` by themselves."""

        def apart(eqn: Any, following: Any) -> bool:
            return id(eqn) in alone or id(following) in alone

        # Evaluated one by one there is nothing to share.
        if not self._shared or is_as_written() or not _jax.is_tracing():
            return _wired(_blocks(eqns, apart), outvars)

        numbers = {id(eqn): self._number(eqn) for eqn in eqns}
        occurs = collections.Counter(numbers.values())

        def number(eqn: Any) -> int:
            return numbers[id(eqn)]

        def is_end(eqn: Any, following: Any) -> bool:
            pair = (number(eqn), numbers.get(id(following)))
            return apart(eqn, following) or hash(pair) % _CUT == 0

        def is_common(eqn: Any) -> bool:
            return eqn is not None and occurs[number(eqn)] >= _SHARED

        def is_end_in_rest(eqn: Any, following: Any) -> bool:
            common = is_common(eqn) or is_common(following)
            return apart(eqn, following) or common

        runs = _wired(_blocks(eqns, is_end), outvars, number)
        times = collections.Counter(run.key for run in runs)
        finer = list[Sequence[Any]]()
        for run in runs:
            again = times[run.key] > 1
            finer += [run.eqns] if again else _blocks(run.eqns, is_end_in_rest)
        return [
            run
            if times[run.key] > 1 or (len(run.eqns) == 1 and is_common(run.eqns[0]))
            else dataclasses.replace(run, key=None)
            for run in _wired(finer, outvars, number)
        ]

    def _number(self, eqn: Any) -> int:
        # Equations of different scopes stay apart: profiles show the scope.
        key = (signature(eqn), eqn.source_info.name_stack)
        return self._numbers.setdefault(key, len(self._numbers))


def _evaluate(run: Run, *values: Any) -> list[Any]:
    jaxpr = _jax.subjaxpr(run.eqns, run.reads, run.writes)
    return list(_jax.evaluate(jaxpr, (), values))


def _blocks(
    eqns: Sequence[Any], is_end: Callable[[Any, Any], bool]
) -> Iterator[list[Any]]:
    """Cut equations after each one that `is_end` says of it and the next one.

    A block that is too long is not cut within one call.
    """
    block = []
    for eqn, following in itertools.zip_longest(eqns, eqns[1:]):
        block.append(eqn)
        whole = len(block) < _LONGEST or (
            following and _jax.are_inlined(eqn, following)
        )
        if not whole or is_end(eqn, following):
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
