"""A whole program as one flat graph of values, every nested jaxpr spelled out.

A value knows the values it is computed from (`feeds`) and, among them, those that its
tangent is computed from (`grads`). `Reach` answers which inputs reach which results;
here is also the way between them. A loop is in it once: its carry is a *join* of the
initial value and of what the body hands on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.labels import Path, Spot

from .reach import Bits

Node = int  # the number of a value


class Operation:
    """An equation at one place of the program, or the joint of a loop or branch.

    One that `copies` is the joint at which a found value leaves the body it is made in.
    """

    __slots__ = (
        "always",
        "copies",
        "cotangents",
        "eqn",
        "held",
        "inputs",
        "is_told",
        "join",
        "masks",
        "moving",
        "overwrites",
        "path",
        "refuses",
        "refusing",
        "values",
        "within",
    )

    def __init__(self, eqn: Any, path: Path, join: bool = False) -> None:
        self.eqn, self.path, self.join = eqn, path, join
        self.within: tuple[Any, ...] = ()  # the equations whose bodies it is in
        self.values: list[Node] = []
        self.inputs: Sequence[Node | None] = ()
        self.masks = self.overwrites = self.held = self.copies = False
        # Sources (as bits) and operands with which its rule raises.
        self.refuses: Bits = 0
        self.refusing: Sequence[Node | None] = ()
        self.always = False  # also where no gradient comes back
        # What a rule was told that asks for it: with which sources each operand moves,
        # and the results (as bits) that a gradient comes to.
        self.is_told = False
        self.moving: Sequence[Bits] | None = None
        self.cotangents: Bits | None = None

    @property
    def known(self) -> bool:
        """Whether its rule works whatever moves."""
        return not self.refuses and not self.refusing

    @property
    def is_derived(self) -> bool:
        """Whether a derivative that the program takes made it, of what was called."""
        return any("jvp" in _jax.transforms_of(e) for e in (self.eqn, *self.within))

    @property
    def spot(self) -> Spot | None:
        """The user's expression, or None where there is no source."""
        return self.path.spots[-1] if self.path.spots else None

    @property
    def name(self) -> str:
        """What the user called, as the source spells it, or JAX's name for it."""
        spot = self.path.innermost
        called = (spot.callee if spot else "") or _jax.gate_name(self.eqn)
        if not called and (address := _jax.edited_at(self.eqn)):
            return f"edit of {address}"
        return called or _jax.call_name(self.eqn) or _jax.kind_of(self.eqn)


class Graph:
    """The values of a program, numbered in program order.

    `inputs`, `outputs` and `found` (of a plan) are numbers of values, or None for what
    is constant. `ops[maker[v]]` made value v; `maker[v]` is -1 for an input.
    """

    def __init__(self) -> None:
        """Begin with nothing; `unfold.py` fills it."""
        self.ops: list[Operation] = []
        self.avals: list[Any] = []
        self.maker: list[int] = []
        self.grads: list[Sequence[Node]] = []
        self.feeds: list[Sequence[Node]] = []
        # Results of a custom_vjp, which JAX takes to move with all that it reads.
        self.moves: dict[Node, Sequence[Node]] = {}
        self.loops: list[tuple[Node, Node]] = []  # first value and last one of each
        self.inputs: Sequence[Node] = ()
        self.outputs: Sequence[Node | None] = ()
        self.found: list[Node | None] = []
        # A value that is one of several, whichever the run decides (None: a constant).
        self.cases: dict[Node, Sequence[Node | None]] = {}

    def copied(self, ops: Iterable[int]) -> Graph:
        """Return a graph of the same values whose edges, and these ops, may change."""
        new = Graph()
        new.__dict__.update(self.__dict__)
        # These were read off the edges as they were.
        new.__dict__.pop("followers", None)
        new.__dict__.pop("readers", None)
        new.ops, new.grads, new.feeds = list(self.ops), [*self.grads], [*self.feeds]
        for k in ops:
            new.ops[k] = copy.copy(self.ops[k])
        return new

    def original(self, value: Node) -> Node:
        """Return what a found value is that a body returned."""
        number = self.maker[value]
        while number >= 0 and self.ops[number].copies:
            (value,) = self.feeds[value]
            number = self.maker[value]
        return value

    # Passes ---------------------------------------------------------------------

    def forward(
        self,
        sources: Iterable[tuple[Node, Bits]],
        through: Sequence[Sequence[Node]],
        cases: Mapping[Node, Sequence[Node | None]] | None = None,
    ) -> list[Bits]:
        """Carry bits from values to all that follows, along `grads` or `feeds`.

        With `cases`, a value that is one of several counts only for what comes with
        each of them.
        """
        own, cases = [0] * len(self.maker), cases or {}
        for value, bits in sources:
            own[value] |= bits
        out = list(own)
        ends: dict[Node, list[Node]] = {}
        for first, end in self.loops:
            ends.setdefault(end, []).append(first)
        # One pass, as all but joints read what was made before. Where a joint would
        # grow by the end of its loop, the pass goes back to the first value of that.
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

    def _grows(self, first: Node, last: Node, through: Any, out: list[Bits]) -> bool:
        """Tell whether a joint of this loop would change in another round."""
        for value in range(first, last + 1):
            sources = through[value]
            # Only a joint reads what comes after it, and has that put last.
            if not sources or sources[-1] < value:
                continue
            if any(out[source] & ~out[value] for source in sources):
                return True
        return False

    def without(self, blocked: Callable[[Operation], bool]) -> list[Sequence[Node]]:
        """Return `grads` as if nothing passed some operations."""
        shut = [blocked(op) for op in self.ops]
        pairs = zip(self.grads, self.maker, strict=True)
        return [() if maker >= 0 and shut[maker] else g for g, maker in pairs]

    def backward(
        self, sinks: Iterable[Node], through: Sequence[Sequence[Node]]
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
    def followers(self) -> list[list[Node]]:
        """For each value, those whose tangent is computed from its own."""
        out: list[list[Node]] = [[] for _ in self.maker]
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
